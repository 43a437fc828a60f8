/* What files for AVX2 share. The including file defines INLINE. */
#ifndef TBN_COMMON256_H
#define TBN_COMMON256_H

/* The next loop is unrolled: its variables are registers. */
#define UNROLL _Pragma("GCC unroll 8")
#define TBN_UNROLL16 _Pragma("GCC unroll 16")

#define REGISTER_KEEP(value) __asm__("" : "+r"(value))

INLINE void store_i32(int32_t *z, __m128i sums16, int accumulate) {
    __m256i sums = _mm256_cvtepi16_epi32(sums16);
    if (accumulate)
        sums = _mm256_add_epi32(sums, _mm256_loadu_si256((const __m256i *)(const void *)z));
    _mm256_storeu_si256((__m256i *)(void *)z, sums);
}

/* Eight rows and columns: interleaved within 16 bytes in two steps, then halves of vectors change places. */
INLINE void transpose_eight(const float *in, size_t in_stride, float *out, size_t out_stride) {
    __m256 a[8], b[8];
    UNROLL for (int i = 0; i < 8; i++)
        a[i] = _mm256_loadu_ps(in + (size_t)i * in_stride);
    UNROLL for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
    UNROLL for (int i = 0; i < 8; i += 4) {
        UNROLL for (int j = 0; j < 2; j++) {
            a[i + 2 * j] = _mm256_shuffle_ps(b[i + j], b[i + j + 2], 0x44);
            a[i + 2 * j + 1] = _mm256_shuffle_ps(b[i + j], b[i + j + 2], 0xee);
        }
    }
    UNROLL for (int j = 0; j < 4; j++) {
        _mm256_storeu_ps(out + (size_t)j * out_stride, _mm256_permute2f128_ps(a[j], a[4 + j], 0x20));
        _mm256_storeu_ps(out + (size_t)(4 + j) * out_stride, _mm256_permute2f128_ps(a[j], a[4 + j], 0x31));
    }
}

INLINE void transpose_block(const float *in, size_t in_stride, float *out, size_t out_stride) {
    for (size_t row = 0; row < TBN_BATCH; row += 8)
        for (size_t column = 0; column < TBN_BATCH; column += 8)
            transpose_eight(in + row * in_stride + column, in_stride, out + column * out_stride + row, out_stride);
}

typedef struct {
    __m256 low, high;
} batch;

INLINE batch batch_zero(void) {
    return (batch){_mm256_setzero_ps(), _mm256_setzero_ps()};
}

INLINE batch batch_load(const float *x) {
    return (batch){_mm256_load_ps(x), _mm256_load_ps(x + 8)};
}

INLINE void batch_store(float *x, batch value) {
    _mm256_store_ps(x, value.low);
    _mm256_store_ps(x + 8, value.high);
}

INLINE batch batch_add(batch a, batch b) {
    return (batch){_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}

INLINE batch batch_subtract(batch a, batch b) {
    return (batch){_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
}

INLINE batch batch_keep(batch value) {
    __asm__("" : "+x"(value.low), "+x"(value.high));
    return value;
}

/* Distances are parts of instructions here; an address that two of them share would take one of its own. */
INLINE batch batch_add_at(batch sum, const char *from, size_t apart) {
    return (batch){_mm256_add_ps(sum.low, _mm256_load_ps((const float *)(const void *)(from + apart))),
                   _mm256_add_ps(sum.high, _mm256_load_ps((const float *)(const void *)(from + apart + 32)))};
}

#endif
