/* The level that every machine has. */
#include "portable.h"

static void tables_i16(const int16_t *x, size_t stride, size_t count, void *tables, size_t table_stride) {
    for (size_t k = 0; k < count; k++, x += stride) {
        int16_t *table = (int16_t *)(void *)((char *)tables + k * table_stride);
        for (unsigned entry = 0; entry < ENTRIES; entry++) {
            int sum = 0;
            for (unsigned i = 0; i < GROUP; i++)
                sum += entry >> i & 1 ? x[i] : -x[i];
            table[entry] = (int16_t)sum;
        }
    }
}

static void lookup_i16(const struct tbn_lookup *job) {
    enum { GROUPS = 4 };
    for (size_t block = 0; block < job->row_blocks; block++)
        for (size_t lane = 0; lane < job->lanes; lane++) {
            const char *tables = (const char *)job->tables + lane * ENTRIES * sizeof(int16_t);
            const uint16_t *words = (const uint16_t *)(const void *)((const char *)job->index + block * job->index_stride);
            int32_t *z = (int32_t *)job->z + lane * job->z_stride + block * ROWS;
            int32_t sum[ROWS] = {0};
            if (job->accumulate)
                memcpy(sum, z, sizeof sum);
            for (size_t word = 0; word < job->words; word++, words += ROWS)
                for (unsigned k = 0; k < GROUPS; k++) {
                    const int16_t *table = (const int16_t *)(const void *)(tables + job->offsets[word * GROUPS + k]);
                    for (size_t row = 0; row < ROWS; row++)
                        sum[row] += table[words[row] >> (GROUP * k) & (ENTRIES - 1)];
                }
            memcpy(z, sum, sizeof sum);
        }
}

const struct tbn_kernels tbn_portable = {
    .name = "portable",
    .dots = NULL,
    .attention = NULL,
    .f32 = {.rows = ROWS, .word_bytes = 4, .groups = 8, .group = GROUP, .table_bytes = ENTRIES * sizeof(float)},
    .i16 = {.rows = ROWS, .word_bytes = 2, .groups = 4, .group = GROUP, .table_bytes = ENTRIES * sizeof(int16_t)},
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
