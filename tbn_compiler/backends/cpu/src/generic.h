/*
 * Kernels in plain C, inlined into every level, so that each gets them in its own instructions.
 */
#ifndef TBN_GENERIC_H
#define TBN_GENERIC_H

#include "kernels.h"

#include <math.h>
#include <string.h>

/* One output. The order of the products is the reference's: (z * alpha) * scale + bias. */
TBN_INLINE float finish_one(float z, float alpha, float scale, const float *bias, int relu) {
    float value = z * alpha * scale;
    if (bias)
        value += *bias;
    return relu && value < 0.0f ? 0.0f : value; /* a NaN is no smaller than 0 and stays */
}

/* Rows [first, last) in every copy. One of `floats` and `integers` holds the sums, the other is NULL. */
TBN_INLINE void finish_rows(const struct tbn_finish *job, const float *floats, const int32_t *integers, float scale,
                            size_t first, size_t last, float *restrict out) {
    const float *bias = job->bias;
    const int relu = job->relu;
    for (size_t copy = 0; copy < job->copies; copy++) {
        const float *alpha = job->alpha + copy * job->alpha_copy_stride;
        const size_t begin = copy * job->rows + first, count = last - first;
        /* The sums lie apart from the outputs, and a scale for each row is rare: loops that the compiler vectorises. */
        if (job->alpha_row_stride) {
            for (size_t i = 0; i < count; i++)
                out[begin + i] = finish_one(floats ? floats[i] : (float)integers[i],
                                            alpha[(first + i) * job->alpha_row_stride], scale,
                                            bias ? bias + begin + i : NULL, relu);
        } else {
            const float same = *alpha;
            for (size_t i = 0; i < count; i++)
                out[begin + i] = finish_one(floats ? floats[i] : (float)integers[i], same, scale,
                                            bias ? bias + begin + i : NULL, relu);
        }
    }
}

TBN_INLINE void finish_channel(const float *z, size_t count, float alpha, float scale, const float *bias, int relu,
                               float *restrict out) {
    const float *local = bias ? &(const float){*bias} : NULL;
    for (size_t i = 0; i < count; i++)
        out[i] = finish_one(z[i], alpha, scale, local, relu);
}

/* z [mixes][count] -> sums over the first axis with the signs of a Hadamard matrix in Sylvester's order, in place. */
#define TBN_MIX(name, type)                                                         \
    TBN_INLINE void name(type *z, size_t mixes, size_t count) {                     \
        for (size_t half = 1; half < mixes; half *= 2)                              \
            for (size_t j = 0; j < mixes; j++) {                                    \
                if (j & half)                                                       \
                    continue; /* the second one of a pair */                        \
                type *restrict a = z + j * count, *restrict b = a + half * count;   \
                for (size_t i = 0; i < count; i++) {                                \
                    const type sum = a[i] + b[i], difference = a[i] - b[i];         \
                    a[i] = sum;                                                     \
                    b[i] = difference;                                              \
                }                                                                   \
            }                                                                       \
    }

TBN_MIX(mix_floats, float)
TBN_MIX(mix_integers, int32_t)

/*
 * The sums of three vectors, `stride` elements apart, with every pattern of signs; bit i of the pattern is the sign of the
 * i-th. The including level defines `vector` and vector_load, vector_zero, vector_add and vector_subtract of that name.
 */
#define TBN_SUMS_OF_THREE(name, type, vector, stride)                                                               \
    INLINE void name(const type *x, vector *sums) {                                                                 \
        const vector x0 = vector##_load(x), x1 = vector##_load(x + (stride)), x2 = vector##_load(x + 2 * (stride)); \
        const vector same = vector##_add(x1, x0), differ = vector##_subtract(x1, x0);                               \
        const vector zero = vector##_zero(); /* x0 - x0 is not zero where x0 is infinite */                         \
        sums[7] = vector##_add(x2, same);                                                                           \
        sums[6] = vector##_add(x2, differ);                                                                         \
        sums[5] = vector##_subtract(x2, differ);                                                                    \
        sums[4] = vector##_subtract(x2, same);                                                                      \
        for (int i = 0; i < 4; i++)                                                                                 \
            sums[i] = vector##_subtract(zero, sums[7 - i]);                                                         \
    }

/* An int8 value, not outside [-127, 127]. Adding and subtracting 1.5 * 2^23 rounds to an integer, half to even. */
TBN_INLINE int16_t int8_value(float x) {
    const float shift = 12582912.0f;
    x = x < -127.0f ? -127.0f : x > 127.0f ? 127.0f : x;
    return (int16_t)((x + shift) - shift);
}

/* Bits of the largest magnitude. As integers, magnitudes compare as they do as floats; infinities and NaN come last. */
TBN_INLINE uint32_t largest_magnitude(const float *x, size_t count) {
    uint32_t largest = 0;
    for (size_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        bits &= 0x7fffffffu;
        largest = bits > largest ? bits : largest;
    }
    return largest;
}

TBN_INLINE int are_finite(const float *x, size_t count) {
    return largest_magnitude(x, count) < 0x7f800000u;
}

/* The scale of int8 inputs, and what they are multiplied with to be integers; 0 where they become zeros. */
TBN_INLINE float scale_of(uint32_t largest_bits, float *factor) {
    float largest;
    memcpy(&largest, &largest_bits, sizeof largest);
    *factor = 0.0f;
    if (!(largest >= 0x1p-100f) || largest == INFINITY) /* schemas.INT8_TINY, or a NaN */
        return largest < 0x1p-100f ? 0.0f : NAN;
    *factor = 127.0f / largest;
    return largest / 127.0f;
}

/* The same of floats as integers of 24 bits, from their largest magnitude and the sum of all; see struct tbn_dots. */
TBN_INLINE float limb_scale_of(uint32_t largest_bits, double sum, size_t count, float *factor) {
    float largest, scale;
    memcpy(&largest, &largest_bits, sizeof largest);
    *factor = 0.0f;
    if (largest == 0.0f)
        return 0.0f;
    if (!(largest >= 0x1p-100f && largest < 0x1p100f && (double)largest * (double)count <= TBN_LIMB_RANGE * sum))
        return NAN;
    /* 2^e <= largest < 2^(e + 1): the scale is 2^(e - 22), and the largest integer at most 2^23. */
    const uint32_t exponent = largest_bits >> 23, scale_bits = (exponent - 22) << 23, factor_bits = (276 - exponent) << 23;
    memcpy(&scale, &scale_bits, sizeof scale);
    memcpy(factor, &factor_bits, sizeof *factor);
    return scale;
}

/* The scale of inputs, or `*fixed` unless that is NULL, and the factor that makes int8 values of them; see schemas.py. */
TBN_INLINE float measure_token(const float *x, size_t count, int binary, const float *fixed, float *factor) {
    *factor = 0.0f;
    if (fixed) {
        if (!(*fixed >= 0x1p-100f && *fixed < INFINITY) || largest_magnitude(x, count) > 0x7f800000u) /* a NaN */
            return NAN;
        *factor = 1.0f / *fixed;
        return *fixed;
    }
    if (binary) {
        double sum = 0.0;
        for (size_t i = 0; i < count; i++)
            sum += (double)fabsf(x[i]);
        return (float)(sum / (double)count);
    }
    return scale_of(largest_magnitude(x, count), factor);
}

TBN_INLINE float quantize_token(const float *x, size_t count, int binary, const float *fixed, int16_t *q) {
    float factor;
    const float scale = measure_token(x, count, binary, fixed, &factor);
    if (binary)
        for (size_t i = 0; i < count; i++)
            q[i] = x[i] > 0.0f ? 1 : -1;
    else if (factor == 0.0f)
        memset(q, 0, count * sizeof *q);
    else
        for (size_t i = 0; i < count; i++)
            q[i] = int8_value(x[i] * factor);
    return scale;
}

#endif
