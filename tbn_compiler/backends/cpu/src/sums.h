/*
 * "Four Russians" with the batch across the vector: tables for a few groups of inputs in memory, then all rows, then
 * the next groups. The including level defines `batch`, one value of TBN_BATCH tokens, as one or more of its vectors,
 * batch_zero, batch_load, batch_store, batch_add and batch_subtract for it, and transpose_block, which writes the
 * transpose of a TBN_BATCH x TBN_BATCH block.
 */
#include <string.h>

TBN_SUMS_OF_THREE(sums_of_three, float, batch, TBN_BATCH)

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
#if defined(TBN_LITTLE_ENDIAN)
        const size_t offset = (uint16_t)(offsets >> (16 * k));
#else
        const size_t offset = index[k];
#endif
        sum = batch_add(sum, batch_load((const float *)(const void *)(tables + k * TBN_SUMS_TABLE_BYTES + offset)));
    }
    return sum;
}

/* out[column][row] = in[row][column], block by block as far as whole blocks go. */
INLINE void transpose(const float *in, size_t in_stride, size_t rows, size_t columns, float *out, size_t out_stride) {
    const size_t whole_rows = rows - rows % TBN_BATCH, whole_columns = columns - columns % TBN_BATCH;
    for (size_t row = 0; row < whole_rows; row += TBN_BATCH)
        for (size_t column = 0; column < whole_columns; column += TBN_BATCH)
            transpose_block(in + row * in_stride + column, in_stride, out + column * out_stride + row, out_stride);
    for (size_t row = 0; row < rows; row++)
        for (size_t column = row < whole_rows ? whole_columns : 0; column < columns; column++)
            out[column * out_stride + row] = in[row * in_stride + column];
}

/* x [inputs][TBN_BATCH] from input `first` on, zeros where there is no such input or token. */
INLINE void transpose_inputs(const struct tbn_sums *job, size_t first, float *x) {
    const size_t left = job->inputs - first;
    const size_t inputs = left < TBN_SUMS_INPUTS ? left : TBN_SUMS_INPUTS;
    if (inputs < TBN_SUMS_INPUTS || job->tokens < TBN_BATCH)
        memset(x, 0, TBN_SUMS_INPUTS * TBN_BATCH * sizeof *x);
    transpose(job->x + first, job->inputs, job->tokens, inputs, x, TBN_BATCH);
}

TARGET static void sums(const struct tbn_sums *job) {
    const uint16_t *index = job->index;
    for (size_t first = 0; first < job->inputs; first += TBN_SUMS_INPUTS, index += job->index_stride) {
        _Alignas(TBN_ALIGN) float x[TBN_SUMS_INPUTS * TBN_BATCH];
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
    transpose(job->z, TBN_BATCH, job->rows, job->tokens, job->out, job->rows);
}
