/*
 * AVX-512 (F, BW, DQ, VL). A table of 5 inputs is 32 entries: two vectors of floats (vpermi2ps reads both) or one of
 * 16-bit integers (vpermw). Looking up costs one shuffle and one addition for 16 or 32 rows times 5 inputs.
 */
#include "generic.h"

#if defined(TBN_X86)

#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2")))
#define INLINE static inline __attribute__((always_inline)) TARGET

/* Keeps a value in a register: the compiler would load tables once for each use, and hoist shuffles out of order. */
#define IN_REGISTER(value) __asm__("" : "+v"(value))

#include "common512.h"

enum { GROUP = 5, F32_GROUPS = 6, I16_GROUPS = 3, F32_ROWS = 16, I16_ROWS = 32, TABLE_F32 = 128, TABLE_I16 = 64 };
enum { MAX_LANES = 4, MAX_BLOCKS = 4 };

/* -1 where bit `bit` of the entry's number is 0, else +1. */
INLINE __m512 sign_f32(int bit) {
    const __m512i entry = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __mmask16 set = _mm512_test_epi32_mask(entry, _mm512_set1_epi32(1 << bit));
    return _mm512_mask_blend_ps(set, _mm512_set1_ps(-1.0f), _mm512_set1_ps(1.0f));
}

TARGET static void tables_f32(const float *x, size_t stride, size_t count, void *tables, size_t table_stride) {
    const __m512 sign[4] = {sign_f32(0), sign_f32(1), sign_f32(2), sign_f32(3)};
    char *table = tables;
    for (size_t k = 0; k < count; k++, x += stride, table += table_stride) {
        __m512 sum = _mm512_mul_ps(sign[0], _mm512_set1_ps(x[0]));
        sum = _mm512_fmadd_ps(sign[1], _mm512_set1_ps(x[1]), sum);
        sum = _mm512_fmadd_ps(sign[2], _mm512_set1_ps(x[2]), sum);
        sum = _mm512_fmadd_ps(sign[3], _mm512_set1_ps(x[3]), sum);
        const __m512 last = _mm512_set1_ps(x[4]);
        _mm512_store_ps(table, _mm512_sub_ps(sum, last));
        _mm512_store_ps(table + 64, _mm512_add_ps(sum, last));
    }
}

/* Two inputs in 16 bits each, in every lane. */
INLINE __m512i pair(const int16_t *x) {
    int32_t both;
    memcpy(&both, x, sizeof both);
    return _mm512_set1_epi32(both);
}

/* Signs of inputs `bit` and `bit + 1` for entries 0 to 15, as the pairs that vpmaddwd multiplies. */
INLINE __m512i sign_pairs(int bit) {
    const __m512i entry = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i low = _mm512_mask_blend_epi32(_mm512_test_epi32_mask(entry, _mm512_set1_epi32(1 << bit)),
                                                _mm512_set1_epi32(0xffff), _mm512_set1_epi32(1));
    const __m512i high = _mm512_mask_blend_epi32(_mm512_test_epi32_mask(entry, _mm512_set1_epi32(2 << bit)),
                                                 _mm512_set1_epi32(-0x10000), _mm512_set1_epi32(0x10000));
    return _mm512_or_si512(low, high);
}

TARGET static void tables_i16(const int16_t *x, size_t stride, size_t count, void *tables, size_t table_stride) {
    const __m512i first = sign_pairs(0), second = sign_pairs(2);
    char *table = tables;
    for (size_t k = 0; k < count; k++, x += stride, table += table_stride) {
        const __m512i sum =
            _mm512_add_epi32(_mm512_madd_epi16(pair(x), first), _mm512_madd_epi16(pair(x + 2), second));
        const __m512i last = _mm512_set1_epi32(x[4]);
        const __m256i low = _mm512_cvtepi32_epi16(_mm512_sub_epi32(sum, last));
        const __m256i high = _mm512_cvtepi32_epi16(_mm512_add_epi32(sum, last));
        _mm512_store_si512(table, _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
    }
}

/* `lanes` inputs times `blocks` row blocks, in registers; both are constants where this is inlined. */
INLINE void lookup_block_f32(const struct tbn_lookup *job, const char *index, const char *tables, float *z,
                             const size_t lanes, const size_t blocks) {
    __m512 sum[MAX_LANES][MAX_BLOCKS], one = _mm512_set1_ps(1.0f);
    IN_REGISTER(one);
    UNROLL for (size_t lane = 0; lane < lanes; lane++)
        UNROLL for (size_t b = 0; b < blocks; b++)
            sum[lane][b] = job->accumulate ? _mm512_loadu_ps(z + lane * job->z_stride + b * F32_ROWS)
                                           : _mm512_setzero_ps();
    const uint32_t *offset = job->offsets;
    for (size_t word = 0; word < job->words; word++, index += F32_ROWS * 4) {
        __m512i entry[MAX_BLOCKS];
        UNROLL for (size_t b = 0; b < blocks; b++)
            entry[b] = _mm512_load_si512(index + b * job->index_stride);
        UNROLL for (int k = 0; k < F32_GROUPS; k++) {
            const char *table = tables + *offset++;
            UNROLL for (size_t lane = 0; lane < lanes; lane++) {
                __m512 low = _mm512_load_ps(table + lane * TABLE_F32);
                __m512 high = _mm512_load_ps(table + lane * TABLE_F32 + 64);
                IN_REGISTER(low);
                IN_REGISTER(high);
                UNROLL for (size_t b = 0; b < blocks; b++) {
                    const __m512 found = _mm512_permutex2var_ps(low, entry[b], high);
                    /* Every other addition is a multiply-add by one: machines with 4 vector pipes run those apart. */
                    sum[lane][b] = (lane + b) % 2 ? _mm512_fmadd_ps(one, found, sum[lane][b])
                                                  : _mm512_add_ps(sum[lane][b], found);
                    IN_REGISTER(sum[lane][b]);
                }
            }
            UNROLL for (size_t b = 0; b < blocks; b++)
                entry[b] = _mm512_srli_epi32(entry[b], GROUP);
        }
    }
    UNROLL for (size_t lane = 0; lane < lanes; lane++)
        UNROLL for (size_t b = 0; b < blocks; b++)
            _mm512_storeu_ps(z + lane * job->z_stride + b * F32_ROWS, sum[lane][b]);
}

INLINE void store_i32(int32_t *z, __m512i sums16, int accumulate) {
    __m512i low = _mm512_cvtepi16_epi32(_mm512_castsi512_si256(sums16));
    __m512i high = _mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(sums16, 1));
    if (accumulate) {
        low = _mm512_add_epi32(low, _mm512_loadu_si512(z));
        high = _mm512_add_epi32(high, _mm512_loadu_si512(z + 16));
    }
    _mm512_storeu_si512(z, low);
    _mm512_storeu_si512(z + 16, high);
}

INLINE void lookup_block_i16(const struct tbn_lookup *job, const char *index, const char *tables, int32_t *z,
                             const size_t lanes, const size_t blocks) {
    __m512i sum[MAX_LANES][MAX_BLOCKS];
    UNROLL for (size_t lane = 0; lane < lanes; lane++)
        UNROLL for (size_t b = 0; b < blocks; b++)
            sum[lane][b] = _mm512_setzero_si512();
    const uint32_t *offset = job->offsets;
    for (size_t word = 0; word < job->words; word++, index += I16_ROWS * 2) {
        __m512i entry[MAX_BLOCKS];
        UNROLL for (size_t b = 0; b < blocks; b++)
            entry[b] = _mm512_load_si512(index + b * job->index_stride);
        UNROLL for (int k = 0; k < I16_GROUPS; k++) {
            const char *table = tables + *offset++;
            UNROLL for (size_t lane = 0; lane < lanes; lane++) {
                __m512i entries = _mm512_load_si512(table + lane * TABLE_I16);
                IN_REGISTER(entries);
                UNROLL for (size_t b = 0; b < blocks; b++) {
                    sum[lane][b] = _mm512_add_epi16(sum[lane][b], _mm512_permutexvar_epi16(entry[b], entries));
                    IN_REGISTER(sum[lane][b]);
                }
            }
            UNROLL for (size_t b = 0; b < blocks; b++)
                entry[b] = _mm512_srli_epi16(entry[b], GROUP);
        }
    }
    UNROLL for (size_t lane = 0; lane < lanes; lane++)
        UNROLL for (size_t b = 0; b < blocks; b++)
            store_i32(z + lane * job->z_stride + b * I16_ROWS, sum[lane][b], job->accumulate);
}

INLINE void lookup_lanes_f32(const struct tbn_lookup *job, size_t first, const size_t lanes) {
    const char *index = job->index, *tables = (const char *)job->tables + first * TABLE_F32;
    float *z = (float *)job->z + first * job->z_stride;
    size_t block = 0;
    for (; block + 4 <= job->row_blocks; block += 4)
        lookup_block_f32(job, index + block * job->index_stride, tables, z + block * F32_ROWS, lanes, 4);
    if (block + 2 <= job->row_blocks) {
        lookup_block_f32(job, index + block * job->index_stride, tables, z + block * F32_ROWS, lanes, 2);
        block += 2;
    }
    if (block < job->row_blocks)
        lookup_block_f32(job, index + block * job->index_stride, tables, z + block * F32_ROWS, lanes, 1);
}

INLINE void lookup_lanes_i16(const struct tbn_lookup *job, size_t first, const size_t lanes) {
    const char *index = job->index, *tables = (const char *)job->tables + first * TABLE_I16;
    int32_t *z = (int32_t *)job->z + first * job->z_stride;
    size_t block = 0;
    for (; block + 4 <= job->row_blocks; block += 4)
        lookup_block_i16(job, index + block * job->index_stride, tables, z + block * I16_ROWS, lanes, 4);
    if (block + 2 <= job->row_blocks) {
        lookup_block_i16(job, index + block * job->index_stride, tables, z + block * I16_ROWS, lanes, 2);
        block += 2;
    }
    if (block < job->row_blocks)
        lookup_block_i16(job, index + block * job->index_stride, tables, z + block * I16_ROWS, lanes, 1);
}

TARGET static void lookup_f32(const struct tbn_lookup *job) {
    size_t lane = 0;
    for (; lane + 4 <= job->lanes; lane += 4)
        lookup_lanes_f32(job, lane, 4);
    switch (job->lanes - lane) {
    case 3: lookup_lanes_f32(job, lane, 3); break;
    case 2: lookup_lanes_f32(job, lane, 2); break;
    case 1: lookup_lanes_f32(job, lane, 1); break;
    default: break;
    }
}

TARGET static void lookup_i16(const struct tbn_lookup *job) {
    size_t lane = 0;
    for (; lane + 4 <= job->lanes; lane += 4)
        lookup_lanes_i16(job, lane, 4);
    switch (job->lanes - lane) {
    case 3: lookup_lanes_i16(job, lane, 3); break;
    case 2: lookup_lanes_i16(job, lane, 2); break;
    case 1: lookup_lanes_i16(job, lane, 1); break;
    default: break;
    }
}

typedef __m512 batch;

INLINE batch batch_zero(void) {
    return _mm512_setzero_ps();
}

INLINE batch batch_load(const float *x) {
    return _mm512_load_ps(x);
}

INLINE void batch_store(float *x, batch value) {
    _mm512_store_ps(x, value);
}

INLINE batch batch_add(batch a, batch b) {
    return _mm512_add_ps(a, b);
}

INLINE batch batch_subtract(batch a, batch b) {
    return _mm512_sub_ps(a, b);
}

INLINE batch batch_add_at(batch sum, const char *from, size_t apart) {
    return batch_add(sum, batch_load((const float *)(const void *)(from + apart)));
}

INLINE batch batch_keep(batch value) {
    __asm__("" : "+v"(value));
    return value;
}

/* Counted: a store a cycle makes tables, and two loads look up. */
#define ROWS_OF_SIXES 160

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

/* The levels differ in what multiplies bytes. */
#define KERNELS \
    .attention = &tbn_attention_avx512, \
    .f32 = {.rows = F32_ROWS, .word_bytes = 4, .groups = F32_GROUPS, .group = GROUP, .table_bytes = TABLE_F32}, \
    .i16 = {.rows = I16_ROWS, .word_bytes = 2, .groups = I16_GROUPS, .group = GROUP, .table_bytes = TABLE_I16}, \
    .tables_f32 = tables_f32, \
    .tables_i16 = tables_i16, \
    .lookup_f32 = lookup_f32, \
    .lookup_i16 = lookup_i16, \
    .sums = sums, \
    .mix_f32 = mix_f32, \
    .mix_i32 = mix_i32, \
    .finish_f32 = finish_f32, \
    .finish_i32 = finish_i32, \
    .finish_plane = finish_plane, \
    .all_finite = all_finite, \
    .quantize = quantize,

const struct tbn_kernels tbn_avx512 = {.name = "avx512", .dots = NULL, KERNELS};
const struct tbn_kernels tbn_avx512vnni = {.name = "avx512vnni", .dots = &tbn_dots_vnni, KERNELS};
#if defined(TBN_AMX)
const struct tbn_kernels tbn_avx512amx = {.name = "avx512amx", .dots = &tbn_dots_amx, KERNELS};
#endif

#endif
