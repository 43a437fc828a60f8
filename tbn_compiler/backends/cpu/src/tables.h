/*
 * Tables of sums in memory, several inputs side by side, and where the bits of a row of weights find their entries. The including
 * level defines INLINE, the vectors that it makes tables of, REGISTER_KEEP, for which a value stays as it is and compilers
 * do not know it, and TBN_UNROLL16.
 */
#ifndef TBN_TABLES_H
#define TBN_TABLES_H

#include "generic.h"

enum { PATTERNS = 16 };

/* name(x [4][stride], table): the table of four values of one of `tiles` tiles; bit i of a pattern is the sign of x[i]. */
#define TBN_FILL_TABLE(name, type, vector, stride)                                          \
    TBN_SUMS_OF_THREE(name##_of_three, type, vector, stride)                                \
    INLINE void name(const type *x, type *table, size_t tiles) {                            \
        const vector last = vector##_load(x + 3 * (stride));                                \
        vector sums[8];                                                                     \
        name##_of_three(x, sums);                                                           \
        for (size_t i = 0; i < 8; i++) {                                                    \
            vector##_store(table + i * tiles * (stride), vector##_subtract(sums[i], last)); \
            vector##_store(table + (8 + i) * tiles * (stride), vector##_add(sums[i], last)); \
        }                                                                                   \
    }

/* The offset of what a row looks up in table number `table` of `width` bits each, whose entries take `entry` bytes: its bits lie
   there once they are turned by width * table. Each is turned on its own, so that none waits for the one before. */
INLINE size_t entry_at(uint64_t bits, size_t table, size_t width, size_t entry) {
    const size_t by = width * table;
    uint64_t at = (bits >> by | bits << (64 - by) % 64) & ((1u << width) - 1) * entry;
    REGISTER_KEEP(at);
    return at;
}

/* Bits turned to where entry_at takes them: entries take 2^shift bytes. */
INLINE uint64_t turned(uint64_t bits, size_t shift) {
    return bits << shift | bits >> (64 - shift);
}

#endif
