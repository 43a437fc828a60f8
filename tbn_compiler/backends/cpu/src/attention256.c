/* Attention on AVX2; see attention_head.h. */
#include "attention.h"
#include "kernels.h"

#if defined(TBN_X86)

#include <immintrin.h>
#include <math.h>

#define TARGET __attribute__((target("avx2,fma,bmi2")))
#define INLINE static inline __attribute__((always_inline)) TARGET

#include "common256.h"

enum { LANES = 8, QUERIES = 6 };
#define MAX_VECTORS 2 /* sums of 12 vectors, of 16 registers */

typedef __m256 vector;
typedef __m256i lanes;

INLINE lanes first_lanes(size_t count) {
    const int some = count < LANES ? (int)count : LANES;
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(some), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

INLINE vector same(float x) {
    return _mm256_set1_ps(x);
}

INLINE vector load(const float *x) {
    return _mm256_load_ps(x);
}

/* Zeros elsewhere. */
INLINE vector load_some(const float *x, lanes some) {
    return _mm256_maskload_ps(x, some);
}

INLINE void store(float *x, vector value) {
    _mm256_store_ps(x, value);
}

INLINE void store_some(float *x, vector value, lanes some) {
    _mm256_maskstore_ps(x, some, value);
}

INLINE vector plus(vector a, vector b) {
    return _mm256_add_ps(a, b);
}

INLINE vector times(vector a, vector b) {
    return _mm256_mul_ps(a, b);
}

INLINE vector multiply_add(vector a, vector b, vector c) {
    return _mm256_fmadd_ps(a, b, c);
}

/* Zeros elsewhere. */
INLINE vector only(vector a, lanes some) {
    return _mm256_and_ps(a, _mm256_castsi256_ps(some));
}

/* The larger one, `b` where one is a NaN, and elsewhere. */
INLINE vector larger_of(vector a, vector b, lanes some) {
    return _mm256_blendv_ps(b, _mm256_max_ps(a, b), _mm256_castsi256_ps(some));
}

INLINE float largest_of(vector a) {
    __m128 value = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    value = _mm_max_ps(value, _mm_movehl_ps(value, value));
    return _mm_cvtss_f32(_mm_max_ss(value, _mm_movehdup_ps(value)));
}

INLINE float sum_of(vector a) {
    __m128 value = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    value = _mm_add_ps(value, _mm_movehl_ps(value, value));
    return _mm_cvtss_f32(_mm_add_ss(value, _mm_movehdup_ps(value)));
}

/* 2^n for n from -126 to 127. */
INLINE __m256 power_of_two(__m256i n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}

INLINE vector nearest(vector a) {
    return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

/* c - a * b */
INLINE vector subtract_product(vector a, vector b, vector c) {
    return _mm256_fnmadd_ps(a, b, c);
}

/* a * 2^n for a whole n from -252 to 254, in two steps: 2^n may be denormal. */
INLINE vector times_power(vector a, vector n) {
    const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
    return _mm256_mul_ps(_mm256_mul_ps(a, power_of_two(half)), power_of_two(_mm256_sub_epi32(whole, half)));
}

INLINE void transpose_lanes(const float *in, size_t in_stride, float *out, size_t out_stride) {
    transpose_eight(in, in_stride, out, out_stride);
}

#include "attention_head.h"

const struct tbn_attention_kernels tbn_attention_avx2 = {QUERIES, room_of, head};

#endif
