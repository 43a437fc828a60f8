/* Attention on AVX-512; see attention_head.h. */
#include "attention.h"
#include "kernels.h"

#if defined(TBN_X86)

#include <immintrin.h>
#include <math.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2")))
#define INLINE static inline __attribute__((always_inline)) TARGET

#include "common512.h"

enum { LANES = 16, QUERIES = 6 };
#define MAX_VECTORS 4 /* sums of 24 vectors, of 32 registers */

typedef __m512 vector;
typedef __mmask16 lanes;

INLINE vector same(float x) {
    return _mm512_set1_ps(x);
}

INLINE vector load(const float *x) {
    return _mm512_load_ps(x);
}

/* Zeros elsewhere. */
INLINE vector load_some(const float *x, lanes some) {
    return _mm512_maskz_loadu_ps(some, x);
}

INLINE void store(float *x, vector value) {
    _mm512_store_ps(x, value);
}

INLINE void store_some(float *x, vector value, lanes some) {
    _mm512_mask_storeu_ps(x, some, value);
}

INLINE vector plus(vector a, vector b) {
    return _mm512_add_ps(a, b);
}

INLINE vector times(vector a, vector b) {
    return _mm512_mul_ps(a, b);
}

INLINE vector multiply_add(vector a, vector b, vector c) {
    return _mm512_fmadd_ps(a, b, c);
}

/* Zeros elsewhere. */
INLINE vector only(vector a, lanes some) {
    return _mm512_maskz_mov_ps(some, a);
}

/* The larger one, `b` where one is a NaN, and elsewhere. */
INLINE vector larger_of(vector a, vector b, lanes some) {
    return _mm512_mask_max_ps(b, some, a, b);
}

INLINE float largest_of(vector a) {
    return _mm512_reduce_max_ps(a);
}

INLINE float sum_of(vector a) {
    return _mm512_reduce_add_ps(a);
}

INLINE vector nearest(vector a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT);
}

/* c - a * b */
INLINE vector subtract_product(vector a, vector b, vector c) {
    return _mm512_fnmadd_ps(a, b, c);
}

/* a * 2^n for a whole n. */
INLINE vector times_power(vector a, vector n) {
    return _mm512_scalef_ps(a, n);
}

INLINE void transpose_lanes(const float *in, size_t in_stride, float *out, size_t out_stride) {
    transpose_block(in, in_stride, out, out_stride);
}

#include "attention_head.h"

const struct tbn_attention_kernels tbn_attention_avx512 = {QUERIES, room_of, head};

#endif
