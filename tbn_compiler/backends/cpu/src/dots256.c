/* Products of bytes, and of floats as they are, on AVX2 machines: by tables in memory. */
#include "generic.h"

#if defined(TBN_X86)

#include <immintrin.h>

#define TARGET __attribute__((target("avx2,bmi2")))
#define INLINE static inline __attribute__((always_inline)) TARGET

#include "common256.h"

typedef __m256i halves;

INLINE halves halves_zero(void) {
    return _mm256_setzero_si256();
}

INLINE halves halves_load(const int16_t *x) {
    return _mm256_load_si256((const __m256i *)(const void *)x);
}

INLINE void halves_store(int16_t *x, halves value) {
    _mm256_store_si256((__m256i *)(void *)x, value);
}

INLINE halves halves_add(halves a, halves b) {
    return _mm256_add_epi16(a, b);
}

INLINE halves halves_subtract(halves a, halves b) {
    return _mm256_sub_epi16(a, b);
}

/* The compiler would put sums together in another order, for which it has no registers. */
INLINE halves halves_keep(halves value) {
    __asm__("" : "+x"(value));
    return value;
}

INLINE void halves_widen(int32_t *z, halves sums, int adds) {
    store_i32(z, _mm256_castsi256_si128(sums), adds);
    store_i32(z + 8, _mm256_extracti128_si256(sums, 1), adds);
}

/* Words of 4 bytes of 8 inputs, [word][input], from 8 words of each. */
INLINE void transpose_words(const uint8_t *const *inputs, size_t offset, __m256i *words) {
    __m256i a[8], b[8];
    UNROLL for (int i = 0; i < 8; i++)
        a[i] = _mm256_loadu_si256((const __m256i *)(const void *)(inputs[i] + offset));
    UNROLL for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
    }
    UNROLL for (int i = 0; i < 8; i += 4) {
        UNROLL for (int j = 0; j < 2; j++) {
            a[i + 2 * j] = _mm256_unpacklo_epi64(b[i + j], b[i + j + 2]);
            a[i + 2 * j + 1] = _mm256_unpackhi_epi64(b[i + j], b[i + j + 2]);
        }
    }
    UNROLL for (int j = 0; j < 4; j++) {
        words[j] = _mm256_permute2x128_si256(a[j], a[4 + j], 0x20);
        words[4 + j] = _mm256_permute2x128_si256(a[j], a[4 + j], 0x31);
    }
}

/* Byte `byte` of each word to the low half of the word, or to its upper half, and zeros beside it. */
INLINE __m256i byte_of(__m256i words, int byte, int upper) {
    const char no = (char)0x80, a = (char)byte, b = (char)(4 + byte), c = (char)(8 + byte), d = (char)(12 + byte);
    const __m128i order = upper ? _mm_setr_epi8(no, no, a, no, no, no, b, no, no, no, c, no, no, no, d, no)
                                : _mm_setr_epi8(a, no, no, no, b, no, no, no, c, no, no, no, d, no, no, no);
    return _mm256_shuffle_epi8(words, _mm256_broadcastsi128_si256(order));
}

INLINE void spread_bytes(const uint8_t *const *inputs, size_t offset, size_t fours, int16_t *x) {
    const uint8_t *const even[8] = {inputs[0], inputs[2], inputs[4], inputs[6], inputs[8], inputs[10], inputs[12], inputs[14]};
    const uint8_t *const odd[8] = {inputs[1], inputs[3], inputs[5], inputs[7], inputs[9], inputs[11], inputs[13], inputs[15]};
    const __m256i zero = _mm256_set1_epi16(TBN_DOT_ZERO);
    for (size_t four = 0; four < fours; four += 8, offset += 32) {
        __m256i a[8], b[8];
        transpose_words(even, offset, a);
        transpose_words(odd, offset, b);
        UNROLL for (int word = 0; word < 8; word++)
            UNROLL for (int byte = 0; byte < 4; byte++, x += TBN_DOT_INPUTS)
                halves_store(x, _mm256_sub_epi16(_mm256_or_si256(byte_of(a[word], byte, 0), byte_of(b[word], byte, 1)), zero));
    }
}

INLINE void spread_floats(const uint8_t *const *inputs, size_t offset, size_t fours, float *x) {
    for (size_t four = 0; four < fours; four += 2, offset += 32) {
        __m256i a[8], b[8];
        transpose_words(inputs, offset, a);
        transpose_words(inputs + 8, offset, b);
        UNROLL for (int word = 0; word < 8; word++, x += TBN_DOT_INPUTS)
            batch_store(x, (batch){_mm256_castsi256_ps(a[word]), _mm256_castsi256_ps(b[word])});
    }
}

#include "dots_plain.h"
#include "dots_tables.h"
#include "float_tables.h"

/* Eight integers of int8 from -127 to 127, as floats are rounded: halves to even. */
INLINE __m256i integers_of(__m256 x, __m256 factor) {
    x = _mm256_mul_ps(x, factor);
    x = _mm256_max_ps(_mm256_min_ps(x, _mm256_set1_ps(127.0f)), _mm256_set1_ps(-127.0f));
    return _mm256_cvtps_epi32(x);
}

/* Sixteen such integers as bytes. */
INLINE __m128i bytes_of_integers(__m256i low, __m256i high) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
    const __m128i packed = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    return _mm_xor_si128(packed, _mm_set1_epi8((char)TBN_DOT_ZERO));
}

TARGET static void bytes256(const float *x, size_t count, enum tbn_activation activation, float factor, uint8_t *out,
                            size_t apart) {
    size_t i = 0;
    const __m256 factors = _mm256_set1_ps(factor);
    for (; activation == TBN_INT8 && factor != 0.0f && i + 16 <= count; i += 16)
        _mm_storeu_si128((__m128i *)(void *)(out + i), bytes_of_integers(integers_of(_mm256_loadu_ps(x + i), factors),
                                                                        integers_of(_mm256_loadu_ps(x + i + 8), factors)));
    bytes(x + i, count - i, activation, factor, out + i, apart);
}

/* Eight results of `row` and those behind it. */
INLINE __m256 finished(const struct tbn_dot_finish *job, const int32_t *z, size_t row, __m256 scale, int has_bias,
                       int relu) {
    const __m256i sums = _mm256_load_si256((const __m256i *)(const void *)(z + row));
    __m256 value = _mm256_castsi256_ps(sums);
    if (job->correction)
        value = _mm256_cvtepi32_ps(
            _mm256_add_epi32(sums, _mm256_loadu_si256((const __m256i *)(const void *)(job->correction + row))));
    value = _mm256_mul_ps(_mm256_mul_ps(value, _mm256_loadu_ps(job->alpha + row)), scale);
    if (has_bias)
        value = _mm256_add_ps(value, _mm256_loadu_ps(job->bias + row));
    return relu ? _mm256_max_ps(_mm256_setzero_ps(), value) : value; /* of 0 and a NaN the second operand */
}

INLINE __m256 added_to(const struct tbn_dot_store *store, size_t at, int adds) {
    if (adds == 1)
        return _mm256_loadu_ps(store->added + at);
    const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)(store->added_bytes + at)));
    const __m256i integers = _mm256_sub_epi32(bytes, _mm256_set1_epi32(TBN_DOT_ZERO));
    return _mm256_mul_ps(_mm256_cvtepi32_ps(integers), _mm256_set1_ps(store->added_scale));
}

/* The arguments behind `i` are numbers that the compiler knows; see store_input. */
INLINE __m256 stored(const struct tbn_dot_finish *job, const struct tbn_dot_store *store, const int32_t *z, size_t row,
                     size_t i, int rounds, int has_bias, int adds) {
    __m256 value = finished(job, z, row, _mm256_set1_ps(job->scales[0]), has_bias, job->relu);
    if (rounds)
        value = _mm256_mul_ps(_mm256_cvtepi32_ps(integers_of(value, _mm256_set1_ps(store->rounded_factor))),
                              _mm256_set1_ps(store->rounded));
    if (adds)
        value = _mm256_add_ps(value, added_to(store, i * store->added_step + row, adds));
    return store->relu ? _mm256_max_ps(_mm256_setzero_ps(), value) : value;
}

/* As many rows as there are sixteens of them; returns how many these are. */
INLINE size_t store_sixteens(const struct tbn_dot_finish *job, const struct tbn_dot_store *store, const int32_t *z,
                             size_t z_stride, size_t rows, size_t inputs, int rounds, int has_bias, int adds, int keeps,
                             int makes_bytes) {
    const size_t whole = rows - rows % 16;
    const __m256 factor = _mm256_set1_ps(store->factor);
    for (size_t i = 0; i < inputs; i++, z += z_stride)
        for (size_t row = 0; row < whole; row += 16) {
            const __m256 low = stored(job, store, z, row, i, rounds, has_bias, adds);
            const __m256 high = stored(job, store, z, row + 8, i, rounds, has_bias, adds);
            if (keeps) {
                _mm256_storeu_ps(store->floats + i * store->floats_step + row, low);
                _mm256_storeu_ps(store->floats + i * store->floats_step + row + 8, high);
            }
            if (makes_bytes)
                _mm_storeu_si128((__m128i *)(void *)(store->bytes + i * store->bytes_step + row),
                                 bytes_of_integers(integers_of(low, factor), integers_of(high, factor)));
        }
    return whole;
}

/* Rows from `first` on. */
static void store_rest(const struct tbn_dot_finish *job, const struct tbn_dot_store *store, const int32_t *z,
                       size_t z_stride, size_t first, size_t rows, size_t inputs) {
    struct tbn_dot_finish finish = *job;
    struct tbn_dot_store rest = *store;
    if (first == rows)
        return;
    finish.correction = finish.correction ? finish.correction + first : NULL;
    finish.alpha += first;
    finish.bias = finish.bias ? finish.bias + first : NULL;
    rest.added = rest.added ? rest.added + first : NULL;
    rest.added_bytes = rest.added_bytes ? rest.added_bytes + first : NULL;
    rest.floats = rest.floats ? rest.floats + first : NULL;
    rest.bytes = rest.bytes ? rest.bytes + first : NULL;
    store_inputs(&finish, &rest, z + first, z_stride, rows - first, inputs);
}

TARGET static void store_inputs256(const struct tbn_dot_finish *job, const struct tbn_dot_store *store, const int32_t *z,
                                   size_t z_stride, size_t rows, size_t inputs) {
    const int rounds = store->rounded_factor != 0.0f, adds = store->added ? 1 : store->added_bytes ? 2 : 0;
    const int keeps = store->floats != NULL, makes_bytes = store->bytes != NULL, has_bias = job->bias != NULL;
    size_t done;
    if (makes_bytes && !keeps && has_bias && adds == 2 && rounds)
        done = store_sixteens(job, store, z, z_stride, rows, inputs, 1, 1, 2, 0, 1);
    else if (makes_bytes && !keeps && has_bias && adds == 2)
        done = store_sixteens(job, store, z, z_stride, rows, inputs, 0, 1, 2, 0, 1);
    else if (makes_bytes && !keeps && has_bias && adds == 0 && !rounds)
        done = store_sixteens(job, store, z, z_stride, rows, inputs, 0, 1, 0, 0, 1);
    else
        done = store_sixteens(job, store, z, z_stride, rows, inputs, rounds, has_bias, adds, keeps, makes_bytes);
    store_rest(job, store, z, z_stride, done, rows, inputs);
}

TARGET static void finish_inputs256(const struct tbn_dot_finish *job, const int32_t *z, size_t z_stride, size_t rows,
                                    size_t inputs, float *out, size_t step) {
    const size_t whole = rows - rows % 8;
    for (size_t i = 0; i < inputs; i++) {
        const __m256 scale = _mm256_set1_ps(job->scales[i * job->scale_step]);
        if (job->bias)
            for (size_t row = 0; row < whole; row += 8)
                _mm256_storeu_ps(out + i * step + row, finished(job, z + i * z_stride, row, scale, 1, job->relu));
        else
            for (size_t row = 0; row < whole; row += 8)
                _mm256_storeu_ps(out + i * step + row, finished(job, z + i * z_stride, row, scale, 0, job->relu));
    }
    struct tbn_dot_finish rest = *job;
    rest.correction = rest.correction ? rest.correction + whole : NULL;
    rest.alpha += whole;
    rest.bias = rest.bias ? rest.bias + whole : NULL;
    finish_inputs(&rest, z + whole, z_stride, rows - whole, inputs, out + whole, step);
}

TARGET static void max_bytes256(const uint8_t *const *from, size_t taps, size_t count, uint8_t *out) {
    size_t i = 0;
    for (; i + 32 <= count; i += 32) {
        __m256i largest = _mm256_setzero_si256();
        for (size_t tap = 0; tap < taps; tap++)
            largest = _mm256_max_epu8(largest, _mm256_loadu_si256((const __m256i *)(const void *)(from[tap] + i)));
        _mm256_storeu_si256((__m256i *)(void *)(out + i), largest);
    }
    for (; i < count; i++) {
        out[i] = 0;
        for (size_t tap = 0; tap < taps; tap++)
            out[i] = from[tap][i] > out[i] ? from[tap][i] : out[i];
    }
}

const struct tbn_dots tbn_dots_avx2 = {
    .gathers = 1, .by_rows = 1, .begin = nothing, .end = nothing, .room = table_room, .multiply = multiply_tables,
    .multiply_floats = multiply_float_tables, .sharing = &shared_tables, .sharing_floats = &shared_float_tables,
    .measure = measure, .bytes = bytes256, .bytes_of_planes = bytes_of_planes,
    .combine = NULL, .finish_inputs = finish_inputs256, .finish_rows = finish_by_rows, .store_inputs = store_inputs256,
    .max_bytes = max_bytes256, .max_floats = max_floats,
};

#endif
