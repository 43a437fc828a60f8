/*
 * NEON, on 64-bit ARM. A table of 4 integer inputs is 16 sums of 16 bits, their low bytes and their high bytes apart
 * (tbl looks up bytes).
 */
#include "kernels.h"

#if defined(TBN_ARM)

#include "portable.h"

#include <arm_neon.h>

/* The next loop is unrolled: its variables are registers. */
#define UNROLL _Pragma("GCC unroll 8")
#define UNROLL16 _Pragma("GCC unroll 16")

enum { I16_GROUPS = 2, TABLE = 32, MAX_LANES = 2, MAX_BLOCKS = 2 };

static void tables_i16(const int16_t *x, size_t stride, size_t count, void *tables, size_t table_stride) {
    static const int16_t signs[3][8] = {
        {-1, 1, -1, 1, -1, 1, -1, 1}, {-1, -1, 1, 1, -1, -1, 1, 1}, {-1, -1, -1, -1, 1, 1, 1, 1}};
    uint8_t *table = tables;
    for (size_t k = 0; k < count; k++, x += stride, table += table_stride) {
        int16x8_t sum = vmulq_n_s16(vld1q_s16(signs[0]), x[0]);
        sum = vmlaq_n_s16(sum, vld1q_s16(signs[1]), x[1]);
        sum = vmlaq_n_s16(sum, vld1q_s16(signs[2]), x[2]);
        const uint8x16_t minus = vreinterpretq_u8_s16(vsubq_s16(sum, vdupq_n_s16(x[3])));
        const uint8x16_t plus = vreinterpretq_u8_s16(vaddq_s16(sum, vdupq_n_s16(x[3])));
        vst1q_u8(table, vuzp1q_u8(minus, plus));
        vst1q_u8(table + 16, vuzp2q_u8(minus, plus));
    }
}

static inline void store_i32(int32_t *z, int16x8_t sums, int accumulate) {
    int32x4_t low = vmovl_s16(vget_low_s16(sums)), high = vmovl_high_s16(sums);
    if (accumulate) {
        low = vaddq_s32(low, vld1q_s32(z));
        high = vaddq_s32(high, vld1q_s32(z + 4));
    }
    vst1q_s32(z, low);
    vst1q_s32(z + 4, high);
}

/* `lanes` inputs times `blocks` row blocks, in registers; both are constants where this is inlined. */
TBN_INLINE void lookup_block_i16(const struct tbn_lookup *job, const uint8_t *index, const uint8_t *tables, int32_t *z,
                                 const size_t lanes, const size_t blocks) {
    int16x8_t sum[MAX_LANES][MAX_BLOCKS][2];
    UNROLL for (size_t lane = 0; lane < lanes; lane++)
        UNROLL for (size_t b = 0; b < blocks; b++)
            sum[lane][b][0] = sum[lane][b][1] = vdupq_n_s16(0);
    const uint32_t *offset = job->offsets;
    for (size_t word = 0; word < job->words; word++, index += ROWS) {
        uint8x16_t bytes[MAX_BLOCKS];
        UNROLL for (size_t b = 0; b < blocks; b++)
            bytes[b] = vld1q_u8(index + b * job->index_stride);
        for (int k = 0; k < I16_GROUPS; k++) {
            const uint8_t *table = tables + *offset++;
            UNROLL for (size_t lane = 0; lane < lanes; lane++) {
                const uint8x16_t low = vld1q_u8(table + lane * TABLE), high = vld1q_u8(table + lane * TABLE + 16);
                UNROLL for (size_t b = 0; b < blocks; b++) {
                    const uint8x16_t entry = vandq_u8(bytes[b], vdupq_n_u8(ENTRIES - 1));
                    const uint8x16_t l = vqtbl1q_u8(low, entry), h = vqtbl1q_u8(high, entry);
                    sum[lane][b][0] = vaddq_s16(sum[lane][b][0], vreinterpretq_s16_u8(vzip1q_u8(l, h)));
                    sum[lane][b][1] = vaddq_s16(sum[lane][b][1], vreinterpretq_s16_u8(vzip2q_u8(l, h)));
                }
            }
            UNROLL for (size_t b = 0; b < blocks; b++)
                bytes[b] = vshrq_n_u8(bytes[b], GROUP);
        }
    }
    UNROLL for (size_t lane = 0; lane < lanes; lane++) {
        UNROLL for (size_t b = 0; b < blocks; b++) {
            store_i32(z + lane * job->z_stride + b * ROWS, sum[lane][b][0], job->accumulate);
            store_i32(z + lane * job->z_stride + b * ROWS + 8, sum[lane][b][1], job->accumulate);
        }
    }
}

TBN_INLINE void lookup_lanes_i16(const struct tbn_lookup *job, size_t first, const size_t lanes) {
    const uint8_t *index = job->index, *tables = (const uint8_t *)job->tables + first * TABLE;
    int32_t *z = (int32_t *)job->z + first * job->z_stride;
    size_t block = 0;
    for (; block + 2 <= job->row_blocks; block += 2)
        lookup_block_i16(job, index + block * job->index_stride, tables, z + block * ROWS, lanes, 2);
    if (block < job->row_blocks)
        lookup_block_i16(job, index + block * job->index_stride, tables, z + block * ROWS, lanes, 1);
}

static void lookup_i16(const struct tbn_lookup *job) {
    size_t lane = 0;
    for (; lane + 2 <= job->lanes; lane += 2)
        lookup_lanes_i16(job, lane, 2);
    if (lane < job->lanes)
        lookup_lanes_i16(job, lane, 1);
}

typedef struct {
    int16x8_t low, high;
} halves;

INLINE halves halves_zero(void) {
    return (halves){vdupq_n_s16(0), vdupq_n_s16(0)};
}

INLINE halves halves_load(const int16_t *x) {
    return (halves){vld1q_s16(x), vld1q_s16(x + 8)};
}

INLINE void halves_store(int16_t *x, halves value) {
    vst1q_s16(x, value.low);
    vst1q_s16(x + 8, value.high);
}

INLINE halves halves_add(halves a, halves b) {
    return (halves){vaddq_s16(a.low, b.low), vaddq_s16(a.high, b.high)};
}

INLINE halves halves_subtract(halves a, halves b) {
    return (halves){vsubq_s16(a.low, b.low), vsubq_s16(a.high, b.high)};
}

INLINE halves halves_keep(halves value) {
    __asm__("" : "+w"(value.low), "+w"(value.high));
    return value;
}

INLINE void halves_widen(int32_t *z, halves sums, int adds) {
    store_i32(z, sums.low, adds);
    store_i32(z + 8, sums.high, adds);
}

/* 16 x 16 bytes: pairs of rows change places, then pairs of pairs, and so on. */
INLINE void transpose_bytes(uint8x16_t *rows) {
    UNROLL16 for (int i = 0; i < 16; i += 2) {
        const uint8x16_t a = rows[i], b = rows[i + 1];
        rows[i] = vtrn1q_u8(a, b);
        rows[i + 1] = vtrn2q_u8(a, b);
    }
    UNROLL16 for (int i = 0; i < 16; i += i % 2 ? 3 : 1) {
        const uint16x8_t a = vreinterpretq_u16_u8(rows[i]), b = vreinterpretq_u16_u8(rows[i + 2]);
        rows[i] = vreinterpretq_u8_u16(vtrn1q_u16(a, b));
        rows[i + 2] = vreinterpretq_u8_u16(vtrn2q_u16(a, b));
    }
    UNROLL16 for (int i = 0; i < 16; i += i % 4 == 3 ? 5 : 1) {
        const uint32x4_t a = vreinterpretq_u32_u8(rows[i]), b = vreinterpretq_u32_u8(rows[i + 4]);
        rows[i] = vreinterpretq_u8_u32(vtrn1q_u32(a, b));
        rows[i + 4] = vreinterpretq_u8_u32(vtrn2q_u32(a, b));
    }
    UNROLL16 for (int i = 0; i < 8; i++) {
        const uint64x2_t a = vreinterpretq_u64_u8(rows[i]), b = vreinterpretq_u64_u8(rows[i + 8]);
        rows[i] = vreinterpretq_u8_u64(vtrn1q_u64(a, b));
        rows[i + 8] = vreinterpretq_u8_u64(vtrn2q_u64(a, b));
    }
}

INLINE void spread_bytes(const uint8_t *const *inputs, size_t offset, size_t fours, int16_t *x) {
    for (size_t four = 0; four < fours; four += 4, offset += 16) {
        uint8x16_t bytes[16];
        for (int i = 0; i < 16; i++)
            bytes[i] = vld1q_u8(inputs[i] + offset);
        transpose_bytes(bytes);
        for (int i = 0; i < 16; i++, x += TBN_DOT_INPUTS) {
            const int8x16_t integers = vreinterpretq_s8_u8(veorq_u8(bytes[i], vdupq_n_u8(TBN_DOT_ZERO)));
            halves_store(x, (halves){vmovl_s8(vget_low_s8(integers)), vmovl_high_s8(integers)});
        }
    }
}

#include "dots_plain.h"
#include "dots_tables.h"

/* Floats are left to lookups, or PyTorch: no machine has timed their tables. */
static const struct tbn_dots dots_neon = {
    .gathers = 1, .by_rows = 1, .begin = nothing, .end = nothing, .room = table_room, .multiply = multiply_tables,
    .multiply_floats = NULL, .sharing = &shared_tables,
    .measure = measure, .bytes = bytes, .bytes_of_planes = bytes_of_planes, .combine = NULL,
    .finish_inputs = finish_inputs, .finish_rows = finish_by_rows, .store_inputs = store_inputs, .max_bytes = max_bytes,
    .max_floats = max_floats,
};

const struct tbn_kernels tbn_neon = {
    .name = "neon",
    .dots = &dots_neon,
    .attention = NULL,
    .f32 = {.rows = ROWS, .word_bytes = 4, .groups = 8, .group = GROUP, .table_bytes = ENTRIES * sizeof(float)},
    .i16 = {.rows = ROWS, .word_bytes = 1, .groups = I16_GROUPS, .group = GROUP, .table_bytes = TABLE},
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
