/*
 * Products of floats as they are by tables in memory, as dots_tables.h has them of bytes. The including level defines `batch`
 * and its functions as for sums.h; batch_keep, as halves_keep; batch_add_at, which adds the batch that lies some bytes behind
 * an address; and spread_floats, as spread_bytes.
 */
#ifndef TBN_FLOAT_TABLES_H
#define TBN_FLOAT_TABLES_H

#include "dots_tables.h"

/* Room for tables of floats, and for their sums. */
INLINE float *float_sums(const struct tbn_dot *job) {
    return (float *)(void *)job->weights + FOURS * PATTERNS * TBN_DOT_INPUTS;
}

TBN_FILL_TABLE(fill_float_table, float, batch, TBN_DOT_INPUTS)

/* What a row looks up in the table of four `four`, added to a sum. */
INLINE batch add_entry(uint64_t bits, const float *tables, size_t four, batch sum) {
    const size_t entry = TBN_DOT_INPUTS * sizeof *tables;
    return batch_keep(batch_add_at(sum, (const char *)tables + entry_at(bits, four, 4, entry), four * PATTERNS * entry));
}

/* As look_up. Additions of floats take their time: each row has two sums side by side. */
INLINE void look_up_floats(const uint64_t *rows, const float *tables, size_t fours, batch *sums) {
    batch other[LOOKED_UP];
    uint64_t bits[LOOKED_UP];
    for (size_t row = 0; row < LOOKED_UP; row++) {
        bits[row] = turned(rows[row], 6);
        other[row] = batch_zero();
    }
    TBN_UNROLL16 for (size_t four = 0; four < fours; four++)
        for (size_t row = 0; row < LOOKED_UP; row++)
            if (four % 2)
                other[row] = add_entry(bits[row], tables, four, other[row]);
            else
                sums[row] = add_entry(bits[row], tables, four, sums[row]);
    for (size_t row = 0; row < LOOKED_UP; row++)
        sums[row] = batch_add(sums[row], other[row]);
}

/* The tables of a step. */
INLINE void fill_float_tables(const uint8_t *const *inputs, size_t offset, size_t fours, float *tables) {
    _Alignas(TBN_ALIGN) float x[TBN_DOT_BYTES * TBN_DOT_INPUTS];
    spread_floats(inputs, offset, fours, x);
    for (size_t four = 0; four < fours; four++)
        fill_float_table(x + four * 4 * TBN_DOT_INPUTS, tables + four * PATTERNS * TBN_DOT_INPUTS, 1);
}

/* All rows with the tables of a step. */
INLINE void add_float_rows(const uint64_t *bits, size_t rows, const float *tables, size_t fours, int first, float *sums) {
    for (size_t row = 0; row < rows; row += LOOKED_UP, sums += LOOKED_UP * TBN_DOT_INPUTS) {
        batch found[LOOKED_UP];
        for (size_t i = 0; i < LOOKED_UP; i++)
            found[i] = first ? batch_zero() : batch_load(sums + i * TBN_DOT_INPUTS);
        if (fours == FOURS)
            look_up_floats(bits + row, tables, FOURS, found);
        else
            look_up_floats(bits + row, tables, fours, found);
        for (size_t i = 0; i < LOOKED_UP; i++)
            batch_store(sums + i * TBN_DOT_INPUTS, found[i]);
    }
}

/* [row][input] -> [input][row] */
INLINE void take_floats(const float *sums, size_t rows, float *z) {
    for (size_t row = 0; row < rows; row += TBN_DOT_ROWS)
        transpose_block(sums + row * TBN_DOT_INPUTS, TBN_DOT_INPUTS, z + row, rows);
}

/* A tile of inputs. */
INLINE void multiply_float_tile(const struct tbn_dot *job, const uint8_t *const *inputs, float *z) {
    const size_t rows = job->blocks * TBN_DOT_ROWS;
    float *tables = (float *)(void *)job->weights, *sums = float_sums(job);
    for (size_t step = 0; step < job->steps; step++) {
        const size_t fours = job->places[step].fours;
        fill_float_tables(inputs, job->places[step].offset, fours, tables);
        add_float_rows(job->index + step * rows, rows, tables, fours, step == 0, sums);
    }
    take_floats(sums, rows, z);
}

TARGET static void multiply_float_tables(const struct tbn_dot *job) {
    const size_t z_tile = TBN_DOT_INPUTS * job->blocks * TBN_DOT_ROWS;
    for (size_t tile = 0; tile < job->count; tile++) {
        const uint8_t *inputs[TBN_DOT_INPUTS];
        find_inputs(job->tiles + tile * TBN_DOT_INPUTS, TBN_DOT_INPUTS, inputs);
        multiply_float_tile(job, inputs, (float *)(void *)(job->z + tile * z_tile));
    }
}

TARGET static void add_float_pixel(const struct tbn_dot_pixel *job) {
    float *tables = (float *)(void *)job->tables;
    for (size_t run = 0; run < job->runs; run++) {
        fill_float_tables(job->inputs, run * TBN_DOT_BYTES * sizeof(float), FOURS, tables);
        for (size_t i = 0; i < job->count; i++) {
            const size_t step = job->visits[i].step + run;
            add_float_rows(job->index + step * job->rows, job->rows, tables, FOURS, step == 0,
                           (float *)(void *)job->visits[i].sums);
        }
    }
}

TARGET static void take_float_pixel(const char *sums, size_t rows, int32_t *z) {
    take_floats((const float *)(const void *)sums, rows, (float *)(void *)z);
}

static const struct tbn_dot_sharing shared_float_tables = {
    .lanes = TBN_DOT_INPUTS,
    .table_bytes = FOURS * PATTERNS * TBN_DOT_INPUTS * sizeof(float),
    .sum_bytes = TBN_DOT_INPUTS * sizeof(float),
    .add = add_float_pixel,
    .take = take_float_pixel,
};

#endif
