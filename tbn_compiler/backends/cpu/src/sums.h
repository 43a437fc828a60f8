/*
 * "Four Russians" with the batch across the vector: tables for a few inputs in memory, then all rows, then the next inputs. The
 * including level defines `batch`, one value of TBN_BATCH tokens, as one or more of its vectors, batch_zero, batch_load,
 * batch_store, batch_add and batch_subtract for it; batch_add_at, which adds the batch that lies some bytes behind an
 * address; batch_keep, as REGISTER_KEEP; transpose_block, which writes the transpose of a TBN_BATCH x TBN_BATCH block; what
 * tables.h needs; and ROWS_OF_SIXES, from which number of rows of a layer on tables of six inputs are worth making. They
 * take all of a first-level cache of 32 KiB.
 */
#include <string.h>

#include "tables.h"

enum { SUMS_ENTRY = TBN_BATCH * sizeof(float), SUMS_SHIFT = 6 };

TBN_FILL_TABLE(fours_table, float, batch, TBN_BATCH)

/* The table of six inputs: every sum of the upper three plus every sum of the lower three. */
INLINE void sixes_table(const float *x, float *table) {
    batch low[8], high[8];
    fours_table_of_three(x, low);
    fours_table_of_three(x + 3 * TBN_BATCH, high);
    for (int h = 0; h < 8; h++)
        for (int l = 0; l < 8; l++)
            batch_store(table + (h * 8 + l) * TBN_BATCH, batch_add(high[h], low[l]));
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

/* Adds what `count` rows look up in the tables of a pass, of `width` inputs each; `first`: to nothing. Additions of floats take
   their time: each row has two sums side by side. */
INLINE void add_pass(const uint64_t *index, const char *tables, size_t width, size_t count, int first, float *z) {
    batch even[2], odd[2];
    uint64_t bits[2];
    for (size_t row = 0; row < count; row++) {
        bits[row] = turned(index[row], SUMS_SHIFT);
        even[row] = first ? batch_zero() : batch_load(z + row * TBN_BATCH);
        odd[row] = batch_zero();
    }
    TBN_UNROLL16 for (size_t table = 0; table < TBN_SUMS_INPUTS / width; table++) {
        const size_t apart = (table << width) * SUMS_ENTRY;
        for (size_t row = 0; row < count; row++) {
            const char *found = tables + entry_at(bits[row], table, width, SUMS_ENTRY);
            if (table % 2)
                odd[row] = batch_keep(batch_add_at(odd[row], found, apart));
            else
                even[row] = batch_keep(batch_add_at(even[row], found, apart));
        }
    }
    for (size_t row = 0; row < count; row++)
        batch_store(z + row * TBN_BATCH, batch_add(even[row], odd[row]));
}

INLINE void sums_of(const struct tbn_sums *job, size_t width) {
    const uint64_t *index = job->index;
    float *tables = job->tables;
    for (size_t first = 0; first < job->inputs; first += TBN_SUMS_INPUTS, index += job->index_stride) {
        _Alignas(TBN_ALIGN) float x[TBN_SUMS_INPUTS * TBN_BATCH];
        transpose_inputs(job, first, x);
        for (size_t table = 0; table < TBN_SUMS_INPUTS / width; table++)
            if (width == 4)
                fours_table(x + table * 4 * TBN_BATCH, tables + table * PATTERNS * TBN_BATCH, 1);
            else
                sixes_table(x + table * 6 * TBN_BATCH, tables + table * 64 * TBN_BATCH);
        size_t row = 0;
        for (; row + 2 <= job->rows; row += 2)
            add_pass(index + row, (const char *)tables, width, 2, first == 0, job->z + row * TBN_BATCH);
        if (row < job->rows)
            add_pass(index + row, (const char *)tables, width, 1, first == 0, job->z + row * TBN_BATCH);
    }
    transpose(job->z, TBN_BATCH, job->rows, job->tokens, job->out, job->rows);
}

TARGET static void sums(const struct tbn_sums *job) {
    if (job->layer_rows < ROWS_OF_SIXES)
        sums_of(job, 4);
    else
        sums_of(job, 6);
}
