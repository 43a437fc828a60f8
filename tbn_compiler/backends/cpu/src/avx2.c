/*
 * AVX2. A table of 3 inputs is one vector of 8 floats (vpermps); a table of 4 inputs is 16 sums of 16 bits, their low
 * bytes and their high bytes apart (vpshufb looks up bytes).
 */
#include "generic.h"

#if defined(TBN_X86)

#include <immintrin.h>

#define TARGET __attribute__((target("avx2,bmi2")))
#define INLINE static inline __attribute__((always_inline)) TARGET

#include "common256.h"

/* Keeps a value in a register: the compiler would load tables once for each use, and hoist shuffles out of order. */
#define IN_REGISTER(value) __asm__("" : "+x"(value))

enum { F32_GROUP = 3, F32_GROUPS = 10, F32_ROWS = 8, I16_GROUP = 4, I16_GROUPS = 2, I16_ROWS = 32, TABLE = 32 };
enum { MAX_LANES = 4, MAX_BLOCKS = 4 };

TARGET static void tables_f32(const float *x, size_t stride, size_t count, void *tables, size_t table_stride) {
    const __m256 sign0 = _mm256_setr_ps(-1, 1, -1, 1, -1, 1, -1, 1);
    const __m256 sign1 = _mm256_setr_ps(-1, -1, 1, 1, -1, -1, 1, 1);
    const __m256 sign2 = _mm256_setr_ps(-1, -1, -1, -1, 1, 1, 1, 1);
    char *table = tables;
    for (size_t k = 0; k < count; k++, x += stride, table += table_stride) {
        const __m256 first = _mm256_add_ps(_mm256_mul_ps(sign0, _mm256_set1_ps(x[0])),
                                           _mm256_mul_ps(sign1, _mm256_set1_ps(x[1])));
        _mm256_store_ps((float *)(void *)table,
                        _mm256_add_ps(first, _mm256_mul_ps(sign2, _mm256_set1_ps(x[2]))));
    }
}

/* +1 in the 16-bit lanes whose number has bit `bit` set, else -1. */
INLINE __m256i sign_i16(int bit) {
    const __m256i entry = _mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m256i mask = _mm256_set1_epi16((int16_t)(1 << bit));
    const __m256i set = _mm256_cmpeq_epi16(_mm256_and_si256(entry, mask), mask);
    return _mm256_blendv_epi8(_mm256_set1_epi16(-1), _mm256_set1_epi16(1), set);
}

TARGET static void tables_i16(const int16_t *x, size_t stride, size_t count, void *tables, size_t table_stride) {
    const __m256i sign[4] = {sign_i16(0), sign_i16(1), sign_i16(2), sign_i16(3)};
    char *table = tables;
    for (size_t k = 0; k < count; k++, x += stride, table += table_stride) {
        const __m256i low = _mm256_add_epi16(_mm256_sign_epi16(_mm256_set1_epi16(x[0]), sign[0]),
                                             _mm256_sign_epi16(_mm256_set1_epi16(x[1]), sign[1]));
        const __m256i high = _mm256_add_epi16(_mm256_sign_epi16(_mm256_set1_epi16(x[2]), sign[2]),
                                              _mm256_sign_epi16(_mm256_set1_epi16(x[3]), sign[3]));
        const __m256i sum = _mm256_add_epi16(low, high);
        const __m256i bytes = _mm256_packus_epi16(_mm256_and_si256(sum, _mm256_set1_epi16(0xff)),
                                                  _mm256_srli_epi16(sum, 8));
        /* Packing works on halves: bring the low bytes of both in front. */
        _mm256_store_si256((__m256i *)(void *)table, _mm256_permute4x64_epi64(bytes, 0xd8));
    }
}

/* `lanes` inputs times `blocks` row blocks, in registers; both are constants where this is inlined. */
INLINE void lookup_block_f32(const struct tbn_lookup *job, const char *index, const char *tables, float *z,
                             const size_t lanes, const size_t blocks) {
    __m256 sum[MAX_LANES][MAX_BLOCKS];
    UNROLL for (size_t lane = 0; lane < lanes; lane++)
        UNROLL for (size_t b = 0; b < blocks; b++)
            sum[lane][b] = job->accumulate ? _mm256_loadu_ps(z + lane * job->z_stride + b * F32_ROWS)
                                           : _mm256_setzero_ps();
    const uint32_t *offset = job->offsets;
    for (size_t word = 0; word < job->words; word++, index += F32_ROWS * 4) {
        __m256i entry[MAX_BLOCKS];
        UNROLL for (size_t b = 0; b < blocks; b++)
            entry[b] = _mm256_load_si256((const __m256i *)(const void *)(index + b * job->index_stride));
        for (int k = 0; k < F32_GROUPS; k++) {
            const char *table = tables + *offset++;
            UNROLL for (size_t lane = 0; lane < lanes; lane++) {
                __m256 entries = _mm256_load_ps((const float *)(const void *)(table + lane * TABLE));
                IN_REGISTER(entries);
                UNROLL for (size_t b = 0; b < blocks; b++)
                    sum[lane][b] = _mm256_add_ps(sum[lane][b], _mm256_permutevar8x32_ps(entries, entry[b]));
            }
            UNROLL for (size_t b = 0; b < blocks; b++)
                entry[b] = _mm256_srli_epi32(entry[b], F32_GROUP);
        }
    }
    UNROLL for (size_t lane = 0; lane < lanes; lane++)
        UNROLL for (size_t b = 0; b < blocks; b++)
            _mm256_storeu_ps(z + lane * job->z_stride + b * F32_ROWS, sum[lane][b]);
}

/* Interleaving bytes works on halves: `sum` holds rows 0-7 and 16-23 first, and then rows 8-15 and 24-31. */
INLINE void store_block(int32_t *z, const __m256i *sum, int accumulate) {
    store_i32(z, _mm256_castsi256_si128(sum[0]), accumulate);
    store_i32(z + 8, _mm256_castsi256_si128(sum[1]), accumulate);
    store_i32(z + 16, _mm256_extracti128_si256(sum[0], 1), accumulate);
    store_i32(z + 24, _mm256_extracti128_si256(sum[1], 1), accumulate);
}

INLINE void lookup_block_i16(const struct tbn_lookup *job, const char *index, const char *tables, int32_t *z,
                             const size_t lanes, const size_t blocks) {
    __m256i sum[MAX_LANES][MAX_BLOCKS][2];
    const __m256i nibble = _mm256_set1_epi8(0x0f);
    UNROLL for (size_t lane = 0; lane < lanes; lane++)
        UNROLL for (size_t b = 0; b < blocks; b++)
            sum[lane][b][0] = sum[lane][b][1] = _mm256_setzero_si256();
    const uint32_t *offset = job->offsets;
    for (size_t word = 0; word < job->words; word++, index += I16_ROWS) {
        __m256i bytes[MAX_BLOCKS];
        UNROLL for (size_t b = 0; b < blocks; b++)
            bytes[b] = _mm256_load_si256((const __m256i *)(const void *)(index + b * job->index_stride));
        for (int k = 0; k < I16_GROUPS; k++) {
            const char *table = tables + *offset++;
            UNROLL for (size_t lane = 0; lane < lanes; lane++) {
                const __m128i *entries = (const __m128i *)(const void *)(table + lane * TABLE);
                const __m256i low = _mm256_broadcastsi128_si256(_mm_load_si128(entries));
                const __m256i high = _mm256_broadcastsi128_si256(_mm_load_si128(entries + 1));
                UNROLL for (size_t b = 0; b < blocks; b++) {
                    const __m256i entry = _mm256_and_si256(bytes[b], nibble);
                    const __m256i l = _mm256_shuffle_epi8(low, entry), h = _mm256_shuffle_epi8(high, entry);
                    sum[lane][b][0] = _mm256_add_epi16(sum[lane][b][0], _mm256_unpacklo_epi8(l, h));
                    sum[lane][b][1] = _mm256_add_epi16(sum[lane][b][1], _mm256_unpackhi_epi8(l, h));
                    IN_REGISTER(sum[lane][b][0]);
                    IN_REGISTER(sum[lane][b][1]);
                }
            }
            UNROLL for (size_t b = 0; b < blocks; b++)
                bytes[b] = _mm256_srli_epi16(bytes[b], I16_GROUP);
        }
    }
    UNROLL for (size_t lane = 0; lane < lanes; lane++)
        UNROLL for (size_t b = 0; b < blocks; b++)
            store_block(z + lane * job->z_stride + b * I16_ROWS, sum[lane][b], job->accumulate);
}

INLINE void lookup_lanes_f32(const struct tbn_lookup *job, size_t first, const size_t lanes) {
    const char *index = job->index, *tables = (const char *)job->tables + first * TABLE;
    float *z = (float *)job->z + first * job->z_stride;
    size_t block = 0;
    for (; lanes == 1 && block + 4 <= job->row_blocks; block += 4)
        lookup_block_f32(job, index + block * job->index_stride, tables, z + block * F32_ROWS, lanes, 4);
    for (; block + 2 <= job->row_blocks; block += 2)
        lookup_block_f32(job, index + block * job->index_stride, tables, z + block * F32_ROWS, lanes, 2);
    if (block < job->row_blocks)
        lookup_block_f32(job, index + block * job->index_stride, tables, z + block * F32_ROWS, lanes, 1);
}

INLINE void lookup_lanes_i16(const struct tbn_lookup *job, size_t first, const size_t lanes) {
    const char *index = job->index, *tables = (const char *)job->tables + first * TABLE;
    int32_t *z = (int32_t *)job->z + first * job->z_stride;
    size_t block = 0;
    for (; block + 2 <= job->row_blocks; block += 2)
        lookup_block_i16(job, index + block * job->index_stride, tables, z + block * I16_ROWS, lanes, 2);
    if (block < job->row_blocks)
        lookup_block_i16(job, index + block * job->index_stride, tables, z + block * I16_ROWS, lanes, 1);
}

TARGET static void lookup_f32(const struct tbn_lookup *job) {
    size_t lane = 0;
    for (; lane + 4 <= job->lanes; lane += 4)
        lookup_lanes_f32(job, lane, 4);
    for (; lane + 2 <= job->lanes; lane += 2)
        lookup_lanes_f32(job, lane, 2);
    if (lane < job->lanes)
        lookup_lanes_f32(job, lane, 1);
}

TARGET static void lookup_i16(const struct tbn_lookup *job) {
    size_t lane = 0;
    for (; lane + 2 <= job->lanes; lane += 2)
        lookup_lanes_i16(job, lane, 2);
    if (lane < job->lanes)
        lookup_lanes_i16(job, lane, 1);
}

#define ROWS_OF_SIXES SIZE_MAX /* such tables leave no room in the first-level cache */

#include "sums.h"

TARGET static void mix_f32(float *z, size_t mixes, size_t count) {
    mix_floats(z, mixes, count);
}

TARGET static void mix_i32(int32_t *z, size_t mixes, size_t count) {
    mix_integers(z, mixes, count);
}

TARGET static void finish_f32(const struct tbn_finish *job, const float *z, size_t first, size_t last, float *out) {
    finish_rows(job, z, NULL, 1.0f, first, last, out);
}

TARGET static void finish_i32(const struct tbn_finish *job, const int32_t *z, float scale, size_t first, size_t last,
                              float *out) {
    finish_rows(job, NULL, z, scale, first, last, out);
}

TARGET static void finish_plane(const float *z, size_t count, float alpha, float scale, const float *bias, int relu,
                         float *out) {
    finish_channel(z, count, alpha, scale, bias, relu, out);
}

TARGET static int all_finite(const float *z, size_t count) {
    return are_finite(z, count);
}

TARGET static float quantize(const float *x, size_t count, int binary, const float *fixed, int16_t *q) {
    return quantize_token(x, count, binary, fixed, q);
}

const struct tbn_kernels tbn_avx2 = {
    .name = "avx2",
    .dots = &tbn_dots_avx2,
    .attention = &tbn_attention_avx2,
    .f32 = {.rows = F32_ROWS, .word_bytes = 4, .groups = F32_GROUPS, .group = F32_GROUP, .table_bytes = TABLE},
    .i16 = {.rows = I16_ROWS, .word_bytes = 1, .groups = I16_GROUPS, .group = I16_GROUP, .table_bytes = TABLE},
    .tables_f32 = tables_f32,
    .tables_i16 = tables_i16,
    .lookup_f32 = lookup_f32,
    .lookup_i16 = lookup_i16,
    .sums = sums,
    .mix_f32 = mix_f32,
    .mix_i32 = mix_i32,
    .finish_f32 = finish_f32,
    .finish_i32 = finish_i32,
    .finish_plane = finish_plane,
    .all_finite = all_finite,
    .quantize = quantize,
};

#endif
