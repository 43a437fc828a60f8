/*
 * "Four Russians" with the batch across the vector: tables for a few groups of inputs in memory, then all rows, then
 * the next groups. The including level defines `batch`, one value of TBN_BATCH tokens, as one or more of its vectors,
 * and batch_load, batch_store, batch_add and batch_subtract on it.
 */
#include <string.h>

/* The sums of three inputs with every pattern of signs; bit i of the pattern is the sign of x[i]. */
INLINE void sums_of_three(const float *x, batch *sums) {
    const batch x0 = batch_load(x), x1 = batch_load(x + TBN_BATCH), x2 = batch_load(x + 2 * TBN_BATCH);
    const batch same = batch_add(x1, x0), differ = batch_subtract(x1, x0);
    const batch zero = batch_subtract(x0, x0);
    sums[7] = batch_add(x2, same);
    sums[6] = batch_add(x2, differ);
    sums[5] = batch_subtract(x2, differ);
    sums[4] = batch_subtract(x2, same);
    for (int i = 0; i < 4; i++)
        sums[i] = batch_subtract(zero, sums[7 - i]);
}

/* The table of six inputs: every sum of the upper three plus every sum of the lower three. */
INLINE void sums_table(const float *x, float *table) {
    batch low[8], high[8];
    sums_of_three(x, low);
    sums_of_three(x + 3 * TBN_BATCH, high);
    for (int h = 0; h < 8; h++)
        for (int l = 0; l < 8; l++)
            batch_store(table + (h * 8 + l) * TBN_BATCH, batch_add(high[h], low[l]));
}

/* Adds the entries that one row looks up in four tables. The offsets come in one load: loads are the bottleneck. */
INLINE batch add_four(batch sum, const uint16_t *index, const char *tables) {
    uint64_t offsets;
    memcpy(&offsets, index, sizeof offsets);
    for (int k = 0; k < 4; k++) {
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
        const size_t offset = (uint16_t)(offsets >> (16 * k));
#else
        const size_t offset = index[k];
#endif
        sum = batch_add(sum, batch_load((const float *)(const void *)(tables + k * TBN_SUMS_TABLE_BYTES + offset)));
    }
    return sum;
}

/* x [inputs][TBN_BATCH], zeros where there is no such input or token. */
INLINE void transpose_inputs(const struct tbn_sums *job, size_t first, float *x) {
    const size_t left = job->inputs - first;
    const size_t inputs = left < TBN_SUMS_INPUTS ? left : TBN_SUMS_INPUTS;
    if (inputs < TBN_SUMS_INPUTS || job->tokens < TBN_BATCH)
        memset(x, 0, TBN_SUMS_INPUTS * TBN_BATCH * sizeof *x);
    for (size_t token = 0; token < job->tokens; token++)
        for (size_t i = 0; i < inputs; i++)
            x[i * TBN_BATCH + token] = job->x[token * job->inputs + first + i];
}

TARGET static void sums(const struct tbn_sums *job) {
    const uint16_t *index = job->index;
    for (size_t first = 0; first < job->inputs; first += TBN_SUMS_INPUTS, index += job->index_stride) {
        float x[TBN_SUMS_INPUTS * TBN_BATCH] __attribute__((aligned(TBN_ALIGN)));
        transpose_inputs(job, first, x);
        char *tables = job->tables;
        for (size_t k = 0; k < TBN_SUMS_GROUPS; k++)
            sums_table(x + k * TBN_SUMS_GROUP * TBN_BATCH, (float *)(void *)(tables + k * TBN_SUMS_TABLE_BYTES));
        for (size_t row = 0; row < job->rows; row++) {
            float *z = job->z + row * TBN_BATCH;
            const uint16_t *entries = index + row * TBN_SUMS_GROUPS;
            batch sum = batch_load(first ? z : job->zero);
            sum = add_four(sum, entries, tables);
            batch_store(z, add_four(sum, entries + 4, tables + 4 * TBN_SUMS_TABLE_BYTES));
        }
    }
}
