/* What files for AVX-512 share. The including file defines INLINE. */
#ifndef TBN_COMMON512_H
#define TBN_COMMON512_H

/* The next loop is unrolled: its variables are registers. */
#define UNROLL _Pragma("GCC unroll 16")
#define TBN_UNROLL16 UNROLL

#define REGISTER_KEEP(value) __asm__("" : "+r"(value))

INLINE __mmask16 first_lanes(size_t count) {
    return count < 16 ? (__mmask16)((1u << count) - 1u) : (__mmask16)0xffff;
}

/* Transposes a block of floats. Pairs of rows, then pairs of pairs, are interleaved within 16 bytes; then quarters of vectors change places. */
INLINE void transpose_block(const float *in, size_t in_stride, float *out, size_t out_stride) {
    __m512 a[TBN_BATCH], b[TBN_BATCH];
    UNROLL for (int i = 0; i < TBN_BATCH; i++)
        a[i] = _mm512_loadu_ps(in + (size_t)i * in_stride);
    UNROLL for (int i = 0; i < TBN_BATCH; i += 2) {
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    /* a[4k + j]: column j of every quarter, of rows 4k to 4k + 3 */
    UNROLL for (int i = 0; i < TBN_BATCH; i += 4) {
        UNROLL for (int j = 0; j < 2; j++) {
            const __m512d first = _mm512_castps_pd(b[i + j]), second = _mm512_castps_pd(b[i + j + 2]);
            a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(first, second));
            a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(first, second));
        }
    }
    UNROLL for (int j = 0; j < 4; j++) {
        const __m512 even_low = _mm512_shuffle_f32x4(a[j], a[4 + j], 0x88);
        const __m512 odd_low = _mm512_shuffle_f32x4(a[j], a[4 + j], 0xdd);
        const __m512 even_high = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0x88);
        const __m512 odd_high = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0xdd);
        float *column = out + (size_t)j * out_stride;
        _mm512_storeu_ps(column, _mm512_shuffle_f32x4(even_low, even_high, 0x88));
        _mm512_storeu_ps(column + 4 * out_stride, _mm512_shuffle_f32x4(odd_low, odd_high, 0x88));
        _mm512_storeu_ps(column + 8 * out_stride, _mm512_shuffle_f32x4(even_low, even_high, 0xdd));
        _mm512_storeu_ps(column + 12 * out_stride, _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd));
    }
}

#endif
