/*
 * Products of bytes on machines that have no instruction for them: the sums of four neighbouring bytes with every pattern of
 * signs stand in tables in memory, those of a tile of inputs side by side, so that one load and addition is 4 products of
 * TBN_DOT_INPUTS inputs. A row of weights is read as 4 bits a table.
 *
 * The including level defines `halves`, TBN_DOT_INPUTS integers of 16 bits, as one or more of its vectors; halves_zero,
 * halves_load, halves_store, halves_add and halves_subtract for it; halves_keep, as REGISTER_KEEP; what tables.h needs;
 * halves_widen, which writes or adds halves to integers of 32 bits; spread_bytes, which
 * puts what the bytes of the inputs of a tile stand for side by side, [byte][input], as halves; and transpose_block.
 */
#ifndef TBN_DOTS_TABLES_H
#define TBN_DOTS_TABLES_H

#include "tables.h"

/* LOOKED_UP: rows at a time. */
enum { FOURS = TBN_DOT_BYTES / 4, PAIR = 2, LOOKED_UP = 2 };

/* Steps whose sums fit 16 bits: 4 x 64 x 127. */
enum { NARROW_STEPS = 4 };

/* The buffers of one multiplication. */
struct tables {
    int16_t *tables; /* [four][pattern][tile][input] */
    int16_t *narrow; /* [row][tile][input] */
    int32_t *wide;   /* the same */
};

TARGET static size_t table_room(size_t steps, size_t blocks) {
    (void)steps;
    return PAIR * TBN_DOT_INPUTS * (FOURS * PATTERNS * 2 + blocks * TBN_DOT_ROWS * (2 + 4));
}

TBN_FILL_TABLE(fill_table, int16_t, halves, TBN_DOT_INPUTS)

/* The tables of a step. */
INLINE void fill_tables(const uint8_t *const *inputs, size_t offset, size_t fours, size_t tiles, int16_t *tables) {
    for (size_t tile = 0; tile < tiles; tile++) {
        _Alignas(TBN_ALIGN) int16_t x[TBN_DOT_BYTES * TBN_DOT_INPUTS];
        spread_bytes(inputs + tile * TBN_DOT_INPUTS, offset, fours, x);
        for (size_t four = 0; four < fours; four++)
            fill_table(x + four * 4 * TBN_DOT_INPUTS, tables + (four * PATTERNS * tiles + tile) * TBN_DOT_INPUTS, tiles);
    }
}

/* Adds what LOOKED_UP rows look up: their additions go side by side. */
INLINE void look_up(const uint64_t *rows, const int16_t *tables, size_t fours, size_t tiles, halves sums[][PAIR]) {
    const size_t entry = tiles * TBN_DOT_INPUTS * sizeof *tables, shift = tiles == 2 ? 6 : 5;
    const char *table = (const char *)tables;
    uint64_t bits[LOOKED_UP];
    for (size_t row = 0; row < LOOKED_UP; row++)
        bits[row] = turned(rows[row], shift);
    TBN_UNROLL16 for (size_t four = 0; four < fours; four++)
        for (size_t row = 0; row < LOOKED_UP; row++) {
            const char *found = table + entry_at(bits[row], four, 4, entry) + four * PATTERNS * entry;
            for (size_t tile = 0; tile < tiles; tile++)
                sums[row][tile] = halves_keep(halves_add(
                    sums[row][tile], halves_load((const int16_t *)(const void *)found + tile * TBN_DOT_INPUTS)));
        }
}

/* All rows with the tables of one step; `first`, `last`: of the steps whose sums fit 16 bits; `adds` them to those before. */
INLINE void add_rows(const uint64_t *bits, size_t rows, const struct tables *room, size_t fours, size_t tiles, int first,
                     int last, int adds) {
    int16_t *narrow = room->narrow;
    int32_t *wide = room->wide;
    const size_t apart = tiles * TBN_DOT_INPUTS;
    for (size_t row = 0; row < rows; row += LOOKED_UP, narrow += LOOKED_UP * apart, wide += LOOKED_UP * apart) {
        halves sums[LOOKED_UP][PAIR];
        for (size_t i = 0; i < LOOKED_UP; i++)
            for (size_t tile = 0; tile < tiles; tile++)
                sums[i][tile] = first ? halves_zero() : halves_load(narrow + i * apart + tile * TBN_DOT_INPUTS);
        if (fours == FOURS)
            look_up(bits + row, room->tables, FOURS, tiles, sums);
        else
            look_up(bits + row, room->tables, fours, tiles, sums);
        for (size_t i = 0; i < LOOKED_UP; i++)
            for (size_t tile = 0; tile < tiles; tile++)
                if (last)
                    halves_widen(wide + i * apart + tile * TBN_DOT_INPUTS, sums[i][tile], adds);
                else
                    halves_store(narrow + i * apart + tile * TBN_DOT_INPUTS, sums[i][tile]);
    }
}

/* All rows with the tables of step `step` of `steps`. */
INLINE void add_step(const uint64_t *bits, size_t rows, const struct tables *room, size_t fours, size_t tiles, size_t step,
                     size_t steps) {
    const int first = step % NARROW_STEPS == 0, last = step % NARROW_STEPS == NARROW_STEPS - 1 || step + 1 == steps;
    if (first && last)
        add_rows(bits, rows, room, fours, tiles, 1, 1, step >= NARROW_STEPS);
    else if (first)
        add_rows(bits, rows, room, fours, tiles, 1, 0, 0);
    else if (!last)
        add_rows(bits, rows, room, fours, tiles, 0, 0, 0);
    else
        add_rows(bits, rows, room, fours, tiles, 0, 1, step >= NARROW_STEPS);
}

/* [row][tile][input] -> [tile][input][row] */
INLINE void take_wide(const int32_t *wide, size_t rows, size_t tiles, int32_t *z) {
    for (size_t tile = 0; tile < tiles; tile++)
        for (size_t row = 0; row < rows; row += TBN_DOT_ROWS)
            transpose_block((const float *)(const void *)(wide + (row * tiles + tile) * TBN_DOT_INPUTS),
                            tiles * TBN_DOT_INPUTS, (float *)(void *)(z + tile * TBN_DOT_INPUTS * rows + row), rows);
}

/* `tiles` tiles of inputs. */
INLINE void multiply_tiles(const struct tbn_dot *job, const uint8_t *const *inputs, size_t tiles, int32_t *z) {
    const size_t rows = job->blocks * TBN_DOT_ROWS;
    struct tables room;
    room.tables = (int16_t *)(void *)job->weights;
    room.narrow = room.tables + FOURS * PATTERNS * tiles * TBN_DOT_INPUTS;
    room.wide = (int32_t *)(void *)(room.narrow + rows * tiles * TBN_DOT_INPUTS);
    for (size_t step = 0; step < job->steps; step++) {
        const size_t fours = job->places[step].fours;
        fill_tables(inputs, job->places[step].offset, fours, tiles, room.tables);
        add_step(job->index + step * rows, rows, &room, fours, tiles, step, job->steps);
    }
    take_wide(room.wide, rows, tiles, z);
}

/* Inputs of tiles; nobody reads what comes of those that take the place of none. */
INLINE void find_inputs(const uint8_t *const *tiles, size_t count, const uint8_t **inputs) {
    for (size_t i = 0; i < count; i++)
        inputs[i] = tiles[i] ? tiles[i] : tiles[0];
}

TARGET static void multiply_tables(const struct tbn_dot *job) {
    const size_t z_tile = TBN_DOT_INPUTS * job->blocks * TBN_DOT_ROWS;
    const uint8_t *inputs[PAIR * TBN_DOT_INPUTS];
    for (size_t tile = 0; tile < job->count; tile += PAIR) {
        const size_t tiles = job->count - tile < PAIR ? 1 : PAIR;
        find_inputs(job->tiles + tile * TBN_DOT_INPUTS, tiles * TBN_DOT_INPUTS, inputs);
        if (tiles == PAIR)
            multiply_tiles(job, inputs, PAIR, job->z + tile * z_tile);
        else
            multiply_tiles(job, inputs, 1, job->z + tile * z_tile);
    }
}

/* Sums of a position: narrow ones of all rows, and wide ones behind them. */
TARGET static void add_pixel(const struct tbn_dot_pixel *job) {
    struct tables room = {.tables = (int16_t *)(void *)job->tables};
    for (size_t run = 0; run < job->runs; run++) {
        fill_tables(job->inputs, run * TBN_DOT_BYTES, FOURS, PAIR, room.tables);
        for (size_t i = 0; i < job->count; i++) {
            const size_t step = job->visits[i].step + run;
            room.narrow = (int16_t *)(void *)job->visits[i].sums;
            room.wide = (int32_t *)(void *)(room.narrow + job->rows * PAIR * TBN_DOT_INPUTS);
            add_step(job->index + step * job->rows, job->rows, &room, FOURS, PAIR, step, job->steps);
        }
    }
}

TARGET static void take_pixel(const char *sums, size_t rows, int32_t *z) {
    const int16_t *narrow = (const int16_t *)(const void *)sums;
    take_wide((const int32_t *)(const void *)(narrow + rows * PAIR * TBN_DOT_INPUTS), rows, PAIR, z);
}

static const struct tbn_dot_sharing shared_tables = {
    .lanes = PAIR * TBN_DOT_INPUTS,
    .table_bytes = FOURS * PATTERNS * PAIR * TBN_DOT_INPUTS * sizeof(int16_t),
    .sum_bytes = PAIR * TBN_DOT_INPUTS * (sizeof(int16_t) + sizeof(int32_t)),
    .add = add_pixel,
    .take = take_pixel,
};

#endif
