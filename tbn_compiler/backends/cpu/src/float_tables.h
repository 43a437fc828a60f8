/*
 * Products of floats as they are by tables in memory, as dots_tables.h has them of bytes. The including level defines `batch`
 * and its functions as for sums.h; batch_keep, as halves_keep; and spread_floats, as spread_bytes.
 */
#ifndef TBN_FLOAT_TABLES_H
#define TBN_FLOAT_TABLES_H

#include "dots_tables.h"

/* Room for tables of floats, and for their sums. */
INLINE float *float_sums(const struct tbn_dot *job) {
    return (float *)(void *)job->weights + FOURS * PATTERNS * TBN_DOT_INPUTS;
}

TBN_FILL_TABLE(fill_float_table, float, batch)

/* What a row looks up in the next table, added to a sum. */
INLINE batch add_entry(uint64_t *bits, const char **table, batch sum) {
    const size_t entry = TBN_DOT_INPUTS * sizeof(float);
    const char *found = *table + (*bits & (PATTERNS - 1) * entry);
    *bits = *bits >> 4 | *bits << 60;
    *table += PATTERNS * entry;
    REGISTER_KEEP(*bits);
    return batch_keep(batch_add(sum, batch_load((const float *)(const void *)found)));
}

/* As look_up. Additions of floats take their time: two sums go side by side. */
INLINE batch look_up_floats(uint64_t bits, const float *tables, size_t fours, batch sum) {
    const char *table = (const char *)tables;
    batch other = batch_zero();
    bits = bits << 6 | bits >> 58;
    for (size_t four = 0; four + 2 <= fours; four += 2) {
        sum = add_entry(&bits, &table, sum);
        other = add_entry(&bits, &table, other);
    }
    if (fours % 2)
        sum = add_entry(&bits, &table, sum);
    return batch_add(sum, other);
}

/* A tile of inputs. */
INLINE void multiply_float_tile(const struct tbn_dot *job, const uint8_t *const *inputs, float *z) {
    const size_t rows = job->blocks * TBN_DOT_ROWS;
    float *tables = (float *)(void *)job->weights, *sums = float_sums(job);
    for (size_t step = 0; step < job->steps; step++) {
        _Alignas(TBN_ALIGN) float x[TBN_DOT_BYTES * TBN_DOT_INPUTS];
        const size_t fours = job->places[step].fours;
        const uint64_t *bits = job->index + step * rows;
        spread_floats(inputs, job->places[step].offset, fours, x);
        for (size_t four = 0; four < fours; four++)
            fill_float_table(x + four * 4 * TBN_DOT_INPUTS, tables + four * PATTERNS * TBN_DOT_INPUTS, 1);
        for (size_t row = 0; row < rows; row++) {
            batch sum = step ? batch_load(sums + row * TBN_DOT_INPUTS) : batch_zero();
            if (fours == FOURS)
                sum = look_up_floats(bits[row], tables, FOURS, sum);
            else
                sum = look_up_floats(bits[row], tables, fours, sum);
            batch_store(sums + row * TBN_DOT_INPUTS, sum);
        }
    }
    for (size_t row = 0; row < rows; row += TBN_DOT_ROWS)
        transpose_block(sums + row * TBN_DOT_INPUTS, TBN_DOT_INPUTS, z + row, rows);
}

TARGET static void multiply_float_tables(const struct tbn_dot *job) {
    const size_t z_tile = TBN_DOT_INPUTS * job->blocks * TBN_DOT_ROWS;
    for (size_t tile = 0; tile < job->count; tile++) {
        const uint8_t *inputs[TBN_DOT_INPUTS];
        find_inputs(job->tiles + tile * TBN_DOT_INPUTS, TBN_DOT_INPUTS, inputs);
        multiply_float_tile(job, inputs, (float *)(void *)(job->z + tile * z_tile));
    }
}

#endif
