#include "wide.h"

#include <float.h>
#include <math.h>

int tbn_can_overflow(const float *x, size_t count) {
    /* Every partial sum is at most `count` times this; half of it leaves room for rounding. */
    const float limit = FLT_MAX / 2.0f / (float)count;
    int found = 0;
    for (size_t i = 0; i < count; i++)
        found |= (fabsf(x[i]) > limit) & (fabsf(x[i]) <= FLT_MAX);
    return found;
}

void tbn_wide_sums(const struct tbn_format *format, const uint32_t *block, const float *x, size_t count, double *sums) {
    const size_t word_inputs = format->groups * format->group;
    for (size_t row = 0; row < format->rows; row++)
        sums[row] = 0.0;
    for (size_t i = 0; i < count; i++) {
        const uint32_t *words = block + i / word_inputs * format->rows;
        const double value = (double)x[i];
        for (size_t row = 0; row < format->rows; row++)
            sums[row] += words[row] >> (i % word_inputs) & 1 ? value : -value;
    }
}

float tbn_wide_finish(double sum, float alpha, const float *bias, int relu) {
    const double value = sum * (double)alpha + (bias ? (double)*bias : 0.0);
    return relu && value < 0.0 ? 0.0f : (float)value; /* a NaN is no smaller than 0 and stays */
}
