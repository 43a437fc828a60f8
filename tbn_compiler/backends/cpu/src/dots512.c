/*
 * Products of bytes on AVX-512 machines: vpdpbusd multiplies 64 bytes and adds them to 16 sums; a tile instruction of AMX
 * multiplies 16 inputs with 16 rows of 64 bytes.
 */
#include "generic.h"

#if defined(TBN_X86)

#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,bmi2")))
#define INLINE static inline __attribute__((always_inline)) TARGET

#include "common512.h"

enum { FOURS = TBN_DOT_BYTES / 4 };

static void nothing(void) {
}

/* The weights of two blocks as bytes. */
static size_t room(size_t steps, size_t blocks) {
    (void)blocks;
    return 2 * steps * TBN_DOT_STEP;
}

/* The weights of `blocks` blocks from `block` on as bytes. */
INLINE void expand(const struct tbn_dot *job, size_t block, size_t blocks) {
    const __m512i plus = _mm512_set1_epi8(1), minus = _mm512_set1_epi8(-1), zero = _mm512_setzero_si512();
    const uint64_t *bits = job->index + block * job->steps * FOURS;
    int8_t *out = job->weights;
    for (size_t i = 0; i < blocks * job->steps; i++, bits += FOURS, out += TBN_DOT_STEP) {
        const size_t fours = job->places[i < job->steps ? i : i - job->steps].fours;
        for (size_t four = 0; four < fours; four++)
            _mm512_store_si512(out + four * 64, _mm512_mask_blend_epi8(bits[four], minus, plus));
        for (size_t four = fours; four < FOURS; four++)
            _mm512_store_si512(out + four * 64, zero);
    }
}

/* `count` inputs of a tile with `blocks` blocks of rows. */
INLINE void multiply_some(const struct tbn_dot *job, const uint8_t *const *inputs, size_t count, size_t blocks,
                          int32_t *z) {
    __m512i sum[8][2];
    const uint8_t *input[8];
    const size_t block_bytes = job->steps * TBN_DOT_STEP;
    const int8_t *index = job->weights;
    UNROLL for (size_t i = 0; i < count; i++) {
        input[i] = inputs[i];
        UNROLL for (size_t b = 0; b < blocks; b++)
            sum[i][b] = _mm512_setzero_si512();
    }
    for (size_t step = 0; step < job->steps; step++, index += TBN_DOT_STEP) {
        const size_t offset = job->places[step].offset, fours = job->places[step].fours;
        for (size_t four = 0; four < fours; four++) {
            __m512i weights[2];
            UNROLL for (size_t b = 0; b < blocks; b++)
                weights[b] = _mm512_load_si512(index + b * block_bytes + four * 64);
            UNROLL for (size_t i = 0; i < count; i++) {
                int32_t bytes;
                memcpy(&bytes, input[i] + offset + four * 4, sizeof bytes);
                UNROLL for (size_t b = 0; b < blocks; b++)
                    sum[i][b] = _mm512_dpbusd_epi32(sum[i][b], _mm512_set1_epi32(bytes), weights[b]);
            }
        }
    }
    UNROLL for (size_t i = 0; i < count; i++)
        UNROLL for (size_t b = 0; b < blocks; b++)
            _mm512_store_si512(z + (i * job->blocks + b) * TBN_DOT_ROWS, sum[i][b]);
}

TARGET static void multiply_vnni(const struct tbn_dot *job) {
    for (size_t block = 0; block < job->blocks; block += 2) {
        const int two = block + 1 < job->blocks;
        expand(job, block, two ? 2 : 1);
        for (size_t first = 0; first < job->count * TBN_DOT_INPUTS; first += 8) {
            const uint8_t *const *inputs = job->tiles + first;
            int32_t *z = job->z + (first * job->blocks + block) * TBN_DOT_ROWS;
            if (!inputs[0])
                continue;
            if (inputs[TBN_DOT_GATHERED] && two)
                multiply_some(job, inputs, 8, 2, z);
            else if (inputs[TBN_DOT_GATHERED])
                multiply_some(job, inputs, 8, 1, z);
            else if (two)
                multiply_some(job, inputs, TBN_DOT_GATHERED, 2, z);
            else
                multiply_some(job, inputs, TBN_DOT_GATHERED, 1, z);
        }
    }
}

/* 16 integers as floats are made of them, in float's rounding of halves to even; those of int8 from -127 to 127. */
INLINE __m512i integers_of(__m512 x, enum tbn_activation activation, __m512 factor) {
    if (activation == TBN_BINARY)
        return _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ), _mm512_set1_epi32(-1),
                                       _mm512_set1_epi32(1));
    x = _mm512_mul_ps(x, factor);
    if (activation == TBN_INT8)
        x = _mm512_max_ps(_mm512_min_ps(x, _mm512_set1_ps(127.0f)), _mm512_set1_ps(-127.0f));
    return _mm512_cvt_roundps_epi32(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

/* The bytes of floats in the low three of each lane: q + 2^23, the first limb on top. */
INLINE __m512i limbs_of(__m512 x, __m512 factor) {
    const __m512i q = integers_of(x, TBN_FLOAT, factor); /* 2^23 if the largest magnitude was rounded up */
    return _mm512_add_epi32(_mm512_min_epi32(q, _mm512_set1_epi32((1 << 23) - 1)), _mm512_set1_epi32(1 << 23));
}

/* The scale of floats. */
INLINE float measure_floats(const float *x, size_t count, float *factor) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i largest[4];
    __m512 sum[4];
    UNROLL for (size_t i = 0; i < 4; i++) {
        largest[i] = _mm512_setzero_si512();
        sum[i] = _mm512_setzero_ps();
    }
    for (size_t first = 0; first < count; first += 64)
        UNROLL for (size_t i = 0; i < 4; i++) {
            const size_t at = first + i * 16;
            const __mmask16 lanes = at < count ? first_lanes(count - at) : 0;
            const __m512i bits = _mm512_and_si512(_mm512_maskz_loadu_epi32(lanes, x + at), magnitude);
            largest[i] = _mm512_max_epu32(largest[i], bits);
            sum[i] = _mm512_add_ps(sum[i], _mm512_castsi512_ps(bits));
        }
    const __m512i most =
        _mm512_max_epu32(_mm512_max_epu32(largest[0], largest[1]), _mm512_max_epu32(largest[2], largest[3]));
    const __m512 all = _mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3]));
    return limb_scale_of(_mm512_reduce_max_epu32(most), (double)_mm512_reduce_add_ps(all), count, factor);
}

TARGET static float measure(const float *x, size_t count, enum tbn_activation activation, const float *fixed,
                            float *factor) {
    if (activation == TBN_FLOAT)
        return measure_floats(x, count, factor);
    return measure_token(x, count, activation == TBN_BINARY, fixed, factor);
}

TARGET static void bytes(const float *x, size_t count, enum tbn_activation activation, float factor, uint8_t *out,
                         size_t apart) {
    if (activation != TBN_BINARY && factor == 0.0f) { /* products with infinities and NaN are none */
        for (size_t limb = 0; limb < (activation == TBN_FLOAT ? TBN_LIMBS : 1); limb++)
            memset(out + limb * apart, limb ? 0 : TBN_DOT_ZERO, count);
        return;
    }
    const __m512 factors = _mm512_set1_ps(factor);
    for (size_t i = 0; activation == TBN_FLOAT && i < count; i += 16) {
        const __mmask16 lanes = first_lanes(count - i);
        const __m512i u = limbs_of(_mm512_maskz_loadu_ps(lanes, x + i), factors);
        _mm_mask_storeu_epi8(out + i, lanes, _mm512_cvtepi32_epi8(_mm512_srli_epi32(u, 16)));
        _mm_mask_storeu_epi8(out + apart + i, lanes, _mm512_cvtepi32_epi8(_mm512_srli_epi32(u, 8)));
        _mm_mask_storeu_epi8(out + 2 * apart + i, lanes, _mm512_cvtepi32_epi8(u));
    }
    if (activation == TBN_FLOAT)
        return;
    const __m128i zero = _mm_set1_epi8((char)TBN_DOT_ZERO);
    for (size_t i = 0; i < count; i += 16) {
        const __mmask16 lanes = first_lanes(count - i);
        const __m512i q = integers_of(_mm512_maskz_loadu_ps(lanes, x + i), activation, factors);
        _mm_mask_storeu_epi8(out + i, lanes, _mm_xor_si128(_mm512_cvtepi32_epi8(q), zero));
    }
}

/* The bytes of one position, 4 to each of 16 lanes, to the first `count` of 16 positions `stride` apart. */
INLINE void store_fours(__m512i fours, size_t count, uint8_t *out, size_t stride) {
    _Alignas(TBN_ALIGN) int32_t words[16];
    _mm512_store_si512(words, fours);
    for (size_t i = 0; i < count; i++)
        memcpy(out + i * stride, words + i, 4);
}

/* The low bytes of the lanes of four vectors, side by side in each lane. */
INLINE __m512i low_bytes(const __m512i *q) {
    const __m512i low = _mm512_set1_epi32(0xff);
    const __m512i pair =
        _mm512_or_si512(_mm512_and_si512(q[0], low), _mm512_slli_epi32(_mm512_and_si512(q[1], low), 8));
    const __m512i other = _mm512_or_si512(_mm512_slli_epi32(_mm512_and_si512(q[2], low), 16), _mm512_slli_epi32(q[3], 24));
    return _mm512_or_si512(pair, other);
}

/* `fours` [channel / 4] of 16 channels to the first `count` of 16 positions `stride` apart: 16 neighbouring bytes each. */
INLINE void store_sixteens(const __m512i *fours, size_t count, uint8_t *out, size_t stride) {
    /* In each quarter of the vectors 4 x 4 fours are transposed: bytes[i] has positions i, i + 4, i + 8 and i + 12. */
    const __m512i a = _mm512_unpacklo_epi32(fours[0], fours[1]), b = _mm512_unpackhi_epi32(fours[0], fours[1]);
    const __m512i c = _mm512_unpacklo_epi32(fours[2], fours[3]), d = _mm512_unpackhi_epi32(fours[2], fours[3]);
    const __m512i bytes[4] = {_mm512_unpacklo_epi64(a, c), _mm512_unpackhi_epi64(a, c), _mm512_unpacklo_epi64(b, d),
                              _mm512_unpackhi_epi64(b, d)};
    __m128i positions[16];
    UNROLL for (size_t i = 0; i < 4; i++) {
        positions[4 * 0 + i] = _mm512_castsi512_si128(bytes[i]);
        positions[4 * 1 + i] = _mm512_extracti32x4_epi32(bytes[i], 1);
        positions[4 * 2 + i] = _mm512_extracti32x4_epi32(bytes[i], 2);
        positions[4 * 3 + i] = _mm512_extracti32x4_epi32(bytes[i], 3);
    }
    if (count == 16) {
        UNROLL for (size_t i = 0; i < 16; i++)
            _mm_storeu_si128((__m128i *)(void *)(out + i * stride), positions[i]);
    } else {
        for (size_t i = 0; i < count; i++)
            _mm_storeu_si128((__m128i *)(void *)(out + i * stride), positions[i]);
    }
}

/* The bytes of `lanes` positions of four channels, of which the first `channels` exist, side by side: [limb]. */
INLINE void four_planes(const float *x, size_t plane, size_t channels, __mmask16 lanes, enum tbn_activation activation,
                        __m512 factors, __m512i *fours) {
    __m512i q[4];
    UNROLL for (size_t i = 0; i < 4; i++) {
        const __m512 values = i < channels ? _mm512_maskz_loadu_ps(lanes, x + i * plane) : _mm512_setzero_ps();
        if (activation == TBN_FLOAT)
            q[i] = limbs_of(values, factors);
        else
            q[i] = i < channels ? integers_of(values, activation, factors) : _mm512_setzero_si512();
    }
    if (activation != TBN_FLOAT) {
        fours[0] = _mm512_xor_si512(low_bytes(q), _mm512_set1_epi32((int)0x80808080));
        return;
    }
    UNROLL for (size_t limb = TBN_LIMBS; limb-- > 0;) {
        fours[limb] = low_bytes(q);
        UNROLL for (size_t i = 0; i < 4; i++)
            q[i] = _mm512_srli_epi32(q[i], 8);
    }
}

/* 16 positions, or the first `count`, of all channels. */
INLINE void sixteen_positions(const float *x, size_t plane, size_t channels, size_t count,
                              enum tbn_activation activation, __m512 factors, uint8_t *out, size_t stride,
                              size_t apart) {
    const size_t limbs = activation == TBN_FLOAT ? TBN_LIMBS : 1;
    const __mmask16 lanes = first_lanes(count);
    size_t channel = 0;
    for (; channel + 16 <= channels; channel += 16) {
        __m512i fours[4][TBN_LIMBS];
        UNROLL for (size_t i = 0; i < 4; i++)
            four_planes(x + (channel + i * 4) * plane, plane, 4, lanes, activation, factors, fours[i]);
        UNROLL for (size_t limb = 0; limb < limbs; limb++) {
            const __m512i of_limb[4] = {fours[0][limb], fours[1][limb], fours[2][limb], fours[3][limb]};
            store_sixteens(of_limb, count, out + limb * apart + channel, stride);
        }
    }
    for (; channel < channels; channel += 4) {
        __m512i fours[TBN_LIMBS];
        four_planes(x + channel * plane, plane, channels - channel, lanes, activation, factors, fours);
        UNROLL for (size_t limb = 0; limb < limbs; limb++)
            store_fours(fours[limb], count, out + limb * apart + channel, stride);
    }
}

TARGET static void bytes_of_planes(const float *x, size_t plane, size_t channels, size_t positions,
                                   enum tbn_activation activation, float factor, uint8_t *out, size_t stride,
                                   size_t apart) {
    if (activation != TBN_BINARY && factor == 0.0f) { /* products with infinities and NaN are none */
        for (size_t limb = 0; limb < (activation == TBN_FLOAT ? TBN_LIMBS : 1); limb++)
            for (size_t i = 0; i < positions; i++)
                memset(out + limb * apart + i * stride, limb ? 0 : TBN_DOT_ZERO, channels);
        return;
    }
    const __m512 factors = _mm512_set1_ps(factor);
    for (size_t first = 0; first < positions; first += 16, x += 16, out += 16 * stride) {
        const size_t count = positions - first < 16 ? positions - first : 16;
        if (activation == TBN_FLOAT)
            sixteen_positions(x, plane, channels, count, TBN_FLOAT, factors, out, stride, apart);
        else if (activation == TBN_INT8)
            sixteen_positions(x, plane, channels, count, TBN_INT8, factors, out, stride, apart);
        else
            sixteen_positions(x, plane, channels, count, TBN_BINARY, factors, out, stride, apart);
    }
}

/* 8 sums of limbs put together: whole numbers below 2^53, as no layer has 2^29 inputs. */
INLINE __m256 combined(__m256i first, __m256i second, __m256i third) {
    const __m512d low = _mm512_fmadd_pd(_mm512_cvtepi32_pd(second), _mm512_set1_pd(0x1p8), _mm512_cvtepi32_pd(third));
    return _mm512_cvtpd_ps(_mm512_fmadd_pd(_mm512_cvtepi32_pd(first), _mm512_set1_pd(0x1p16), low));
}

TARGET static void combine(int32_t *z, size_t z_stride, size_t apart, const int32_t *correction, size_t rows,
                           size_t inputs) {
    for (size_t row = 0; row < rows; row += 16) {
        const __m512i correct = _mm512_maskz_loadu_epi32(first_lanes(rows - row), correction + row);
        for (size_t i = 0; i < inputs; i++) {
            int32_t *sums = z + i * z_stride + row;
            const __m512i first = _mm512_add_epi32(_mm512_load_si512(sums), correct);
            const __m512i second = _mm512_load_si512(sums + apart), third = _mm512_load_si512(sums + 2 * apart);
            const __m256 low = combined(_mm512_castsi512_si256(first), _mm512_castsi512_si256(second),
                                        _mm512_castsi512_si256(third));
            const __m256 high =
                combined(_mm512_extracti64x4_epi64(first, 1), _mm512_extracti64x4_epi64(second, 1),
                         _mm512_extracti64x4_epi64(third, 1));
            _mm512_store_ps((float *)(void *)sums, _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1));
        }
    }
}

/* The order of the products is the reference's: (z * alpha) * scale + bias. A NaN is no smaller than 0 and stays. */
INLINE __m512 finished(__m512 z, __m512 alpha, __m512 scale, const __m512 *bias, int relu) {
    __m512 value = _mm512_mul_ps(_mm512_mul_ps(z, alpha), scale);
    if (bias)
        value = _mm512_add_ps(value, *bias);
    return relu ? _mm512_max_ps(_mm512_setzero_ps(), value) : value; /* of 0 and a NaN the second operand */
}

/* What one row block of a result is made with. */
struct row_block {
    __m512i correction;
    __m512 alpha, bias;
};

/* The sums of an input: floats, or integers and their correction. */
INLINE __m512 sums_of(const struct tbn_dot_finish *job, const int32_t *z, __m512i correction) {
    const __m512i sums = _mm512_load_si512(z);
    return job->correction ? _mm512_cvtepi32_ps(_mm512_add_epi32(sums, correction)) : _mm512_castsi512_ps(sums);
}

INLINE struct row_block row_block_of(const struct tbn_dot_finish *job, size_t row, __mmask16 lanes) {
    return (struct row_block){
        .correction =
            job->correction ? _mm512_maskz_loadu_epi32(lanes, job->correction + row) : _mm512_setzero_si512(),
        .alpha = _mm512_maskz_loadu_ps(lanes, job->alpha + row),
        .bias = job->bias ? _mm512_maskz_loadu_ps(lanes, job->bias + row) : _mm512_setzero_ps(),
    };
}

/* 16 rows, or those of them that are `lanes`, of all inputs. */
INLINE void finish_block(const struct tbn_dot_finish *job, const int32_t *z, size_t z_stride, size_t row,
                         __mmask16 lanes, size_t inputs, float *out, size_t step, int has_bias, int relu) {
    const struct row_block block = row_block_of(job, row, lanes);
    for (size_t i = 0; i < inputs; i++) {
        const __m512 sum = sums_of(job, z + i * z_stride + row, block.correction);
        const __m512 scale = _mm512_set1_ps(job->scales[i * job->scale_step]);
        const __m512 value = finished(sum, block.alpha, scale, has_bias ? &block.bias : NULL, relu);
        if (lanes == 0xffff)
            _mm512_storeu_ps(out + i * step + row, value);
        else
            _mm512_mask_storeu_ps(out + i * step + row, lanes, value);
    }
}

TARGET static void finish_inputs(const struct tbn_dot_finish *job, const int32_t *z, size_t z_stride, size_t rows,
                                 size_t inputs, float *out, size_t step) {
    for (size_t row = 0; row < rows; row += 16) {
        const __mmask16 lanes = first_lanes(rows - row);
        if (job->bias && job->relu)
            finish_block(job, z, z_stride, row, lanes, inputs, out, step, 1, 1);
        else if (job->bias)
            finish_block(job, z, z_stride, row, lanes, inputs, out, step, 1, 0);
        else
            finish_block(job, z, z_stride, row, lanes, inputs, out, step, 0, job->relu);
    }
}

/* The integers as bytes. */
INLINE __m128i bytes_of(__m512 x, __m512 factor) {
    return _mm_xor_si128(_mm512_cvtepi32_epi8(integers_of(x, TBN_INT8, factor)), _mm_set1_epi8((char)TBN_DOT_ZERO));
}

/* What is added to the results of `lanes` rows. */
INLINE __m512 added_to(const struct tbn_dot_store *store, size_t at, __mmask16 lanes) {
    if (store->added)
        return _mm512_maskz_loadu_ps(lanes, store->added + at);
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(lanes, store->added_bytes + at));
    const __m512i integers = _mm512_sub_epi32(bytes, _mm512_set1_epi32(TBN_DOT_ZERO));
    return _mm512_mul_ps(_mm512_cvtepi32_ps(integers), _mm512_set1_ps(store->added_scale));
}

/* `adds`, `rounds`, `keeps`: whether something is added, rounded, and kept as floats; numbers that the compiler knows. */
INLINE void store_block(const struct tbn_dot_finish *job, const struct tbn_dot_store *store, const int32_t *z,
                        size_t z_stride, size_t row, __mmask16 lanes, size_t inputs, int rounds, int adds, int keeps) {
    const struct row_block block = row_block_of(job, row, lanes);
    const __m512 factor = _mm512_set1_ps(store->factor), scale = _mm512_set1_ps(job->scales[0]);
    for (size_t i = 0; i < inputs; i++) {
        const __m512 sum = sums_of(job, z + i * z_stride + row, block.correction);
        __m512 value = finished(sum, block.alpha, scale, job->bias ? &block.bias : NULL, job->relu);
        if (rounds) {
            const __m512i integers = integers_of(value, TBN_INT8, _mm512_set1_ps(store->rounded_factor));
            value = _mm512_mul_ps(_mm512_cvtepi32_ps(integers), _mm512_set1_ps(store->rounded));
        }
        if (adds)
            value = _mm512_add_ps(value, added_to(store, i * store->added_step + row, lanes));
        if (store->relu)
            value = _mm512_max_ps(_mm512_setzero_ps(), value);
        if (keeps)
            _mm512_mask_storeu_ps(store->floats + i * store->floats_step + row, lanes, value);
        if (store->bytes)
            _mm_mask_storeu_epi8(store->bytes + i * store->bytes_step + row, lanes, bytes_of(value, factor));
    }
}

TARGET static void store_inputs(const struct tbn_dot_finish *job, const struct tbn_dot_store *store, const int32_t *z,
                                size_t z_stride, size_t rows, size_t inputs) {
    const int rounds = store->rounded_factor != 0.0f, adds = store->added || store->added_bytes;
    for (size_t row = 0; row < rows; row += 16) {
        const __mmask16 lanes = first_lanes(rows - row);
        if (store->floats)
            store_block(job, store, z, z_stride, row, lanes, inputs, rounds, adds, 1);
        else if (rounds && adds)
            store_block(job, store, z, z_stride, row, lanes, inputs, 1, 1, 0);
        else
            store_block(job, store, z, z_stride, row, lanes, inputs, rounds, adds, 0);
    }
}

TARGET static void max_bytes(const uint8_t *const *from, size_t taps, size_t count, uint8_t *out) {
    for (size_t i = 0; i < count; i += 64) {
        const __mmask64 lanes = count - i < 64 ? ((__mmask64)1 << (count - i)) - 1 : ~(__mmask64)0;
        __m512i largest = _mm512_setzero_si512();
        for (size_t tap = 0; tap < taps; tap++)
            largest = _mm512_max_epu8(largest, _mm512_maskz_loadu_epi8(lanes, from[tap] + i));
        _mm512_mask_storeu_epi8(out + i, lanes, largest);
    }
}

TARGET static void max_floats(const float *const *from, size_t taps, size_t count, float *out) {
    for (size_t i = 0; i < count; i += 16) {
        const __mmask16 lanes = first_lanes(count - i);
        __m512 largest = _mm512_set1_ps(-INFINITY);
        for (size_t tap = 0; tap < taps; tap++)
            largest = _mm512_max_ps(largest, _mm512_maskz_loadu_ps(lanes, from[tap] + i));
        _mm512_mask_storeu_ps(out + i, lanes, largest);
    }
}

TARGET static void finish_by_rows(const struct tbn_dot_finish *job, const int32_t *z, size_t z_stride, size_t rows,
                                  size_t outputs, size_t inputs, float *out, size_t step) {
    const __m512 scale = _mm512_set1_ps(job->scales[0]);
    const __mmask16 wanted = first_lanes(inputs);
    _Alignas(TBN_ALIGN) float by_input[16 * 16], by_row[16 * 16];
    for (size_t first = 0; first < rows; first += 16) {
        const __m512i correction = job->correction
                                       ? _mm512_maskz_loadu_epi32(first_lanes(rows - first), job->correction + first)
                                       : _mm512_setzero_si512();
        UNROLL for (size_t i = 0; i < 16; i++)
            _mm512_store_ps(by_input + i * 16, sums_of(job, z + i * z_stride + first, correction));
        transpose_block(by_input, 16, by_row, 16);
        for (size_t row = first; row < rows && row < first + 16; row++)
            for (size_t output = row; output < outputs; output += rows) {
                const __m512 bias = _mm512_set1_ps(job->bias ? job->bias[output] : 0.0f);
                const __m512 value =
                    finished(_mm512_load_ps(by_row + (row - first) * 16), _mm512_set1_ps(job->alpha[output]), scale,
                             job->bias ? &bias : NULL, job->relu);
                _mm512_mask_storeu_ps(out + output * step, wanted, value);
            }
    }
}

#define SHARED \
    .room = room, .measure = measure, .bytes = bytes, .bytes_of_planes = bytes_of_planes, .combine = combine, \
    .finish_inputs = finish_inputs, .finish_rows = finish_by_rows, .store_inputs = store_inputs, \
    .max_bytes = max_bytes, .max_floats = max_floats

const struct tbn_dots tbn_dots_vnni = {.gathers = 1, .begin = nothing, .end = nothing, .multiply = multiply_vnni, SHARED};

#if defined(TBN_AMX)

/* A function of its own instructions. */
TARGET static void expand_blocks(const struct tbn_dot *job, size_t block, size_t blocks) {
    expand(job, block, blocks);
}

#undef TARGET
#define TARGET __attribute__((target("amx-tile,amx-int8")))

/* Tiles 0 to 3 hold sums, 4 and 5 inputs, 6 and 7 weights; all have 16 rows of 64 bytes. */
static const struct __attribute__((packed)) {
    uint8_t palette, start, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} shape = {.palette = 1, .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64}, .rows = {16, 16, 16, 16, 16, 16, 16, 16}};

TARGET static void begin_amx(void) {
    _tile_loadconfig(&shape);
}

TARGET static void end_amx(void) {
    _tile_release();
}

/* Tile instructions read and write memory that compilers do not know of. */
#define MEMORY_IS_CURRENT() __asm__ volatile("" : : : "memory")

/* Two tiles of inputs, or one, with two blocks of rows, or one. Tile instructions take numbers only: macros. */
#define MULTIPLY(TWO_TILES, TWO_BLOCKS) \
    do { \
        const int8_t *weights = job->weights; \
        _tile_zero(0); \
        if (TWO_BLOCKS) \
            _tile_zero(1); \
        if (TWO_TILES) \
            _tile_zero(2); \
        if (TWO_TILES && TWO_BLOCKS) \
            _tile_zero(3); \
        for (size_t step = 0; step < job->steps; step++, weights += TBN_DOT_STEP) { \
            const size_t offset = job->places[step].offset; \
            _tile_loadd(6, weights, 64); \
            if (TWO_BLOCKS) \
                _tile_loadd(7, weights + block_bytes, 64); \
            _tile_loadd(4, job->tiles[tile] + offset, job->stride); \
            _tile_dpbusd(0, 4, 6); \
            if (TWO_BLOCKS) \
                _tile_dpbusd(1, 4, 7); \
            if (TWO_TILES) { \
                _tile_loadd(5, job->tiles[tile + 1] + offset, job->stride); \
                _tile_dpbusd(2, 5, 6); \
                if (TWO_BLOCKS) \
                    _tile_dpbusd(3, 5, 7); \
            } \
        } \
        int32_t *z = job->z + (tile * TBN_DOT_INPUTS * job->blocks + block) * TBN_DOT_ROWS; \
        _tile_stored(0, z, z_bytes); \
        if (TWO_BLOCKS) \
            _tile_stored(1, z + TBN_DOT_ROWS, z_bytes); \
        if (TWO_TILES) \
            _tile_stored(2, z + z_tile, z_bytes); \
        if (TWO_TILES && TWO_BLOCKS) \
            _tile_stored(3, z + z_tile + TBN_DOT_ROWS, z_bytes); \
    } while (0)

TARGET static void multiply_amx(const struct tbn_dot *job) {
    const size_t block_bytes = job->steps * TBN_DOT_STEP, z_tile = TBN_DOT_INPUTS * job->blocks * TBN_DOT_ROWS;
    const size_t z_bytes = job->blocks * TBN_DOT_ROWS * sizeof(int32_t);
    for (size_t block = 0; block < job->blocks; block += 2) {
        const int two_blocks = block + 1 < job->blocks;
        expand_blocks(job, block, two_blocks ? 2 : 1);
        MEMORY_IS_CURRENT();
        for (size_t tile = 0; tile < job->count; tile += 2) {
            const int two_tiles = tile + 1 < job->count;
            if (two_tiles && two_blocks)
                MULTIPLY(1, 1);
            else if (two_tiles)
                MULTIPLY(1, 0);
            else if (two_blocks)
                MULTIPLY(0, 1);
            else
                MULTIPLY(0, 0);
        }
    }
    MEMORY_IS_CURRENT();
}

const struct tbn_dots tbn_dots_amx = {.begin = begin_amx, .end = end_amx, .multiply = multiply_amx, SHARED};

#endif

#endif
