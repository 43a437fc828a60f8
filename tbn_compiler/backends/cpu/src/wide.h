/*
 * Sums of large floats. On the way to a finite sum a partial sum may overflow, depending on the order, and it does not
 * come back: the sum ends as an infinity or a NaN. Such outputs are computed again in double, which no sum of floats
 * leaves. Infinite and NaN inputs need none of it: kernels add every input once, with its sign, and a sum of these is
 * the same in every order.
 */
#ifndef TBN_WIDE_H
#define TBN_WIDE_H

#include "kernels.h"

/* Whether finite inputs among these are so large that a sum of them all, with some signs, can overflow. */
int tbn_can_overflow(const float *x, size_t count);

/* Sums of `count` inputs with the signs of a row block of a prepared float tile: sums [rows of the block]. */
void tbn_wide_sums(const struct tbn_format *format, const uint32_t *block, const float *x, size_t count, double *sums);

/* One output: sum * alpha + bias, rounded once, and the larger of that and 0 if relu. */
float tbn_wide_finish(double sum, float alpha, const float *bias, int relu);

/* Whether the element of a Hadamard matrix in Sylvester's order is -1. */
static inline int tbn_hadamard(size_t row, size_t column) {
    size_t bits = row & column;
    int odd = 0;
    for (; bits; bits &= bits - 1)
        odd = !odd;
    return odd;
}

#endif
