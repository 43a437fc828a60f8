/*
 * Attention on AVX-512: one head. Keys are transposed once, so that a few queries meet 16 keys in each vector; a row of
 * the scores becomes weights where it lies, and these meet the values, 16 of a vector's floats at once. Both products are
 * of one kind: rows of numbers that are broadcast, and a matrix whose rows fill vectors.
 */
#include "attention.h"
#include "kernels.h"

#if defined(TBN_X86)

#include <immintrin.h>
#include <math.h>

#include "scratch.h"

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2")))
#define INLINE static inline __attribute__((always_inline)) TARGET

#include "common512.h"

enum { LANES = 16, MAX_VECTORS = 4, QUERIES = 6 }; /* sums of 24 vectors, of 32 registers */

/* Where the parts of a head's room begin, and how wide their rows are. */
struct room {
    float *keys;   /* [width, filled up][padded keys] */
    float *values; /* [keys][padded value width] */
    float *scores; /* [QUERIES][padded keys] */
    float *sums;   /* [QUERIES][padded value width] */
    float *rest;   /* keys behind the last whole block */
    size_t padded_keys, padded_values;
};

static size_t cut(const struct tbn_attention *job, void *base, struct room *room) {
    struct tbn_scratch scratch = {base, 0};
    const size_t width = tbn_round_up(job->width, LANES);
    room->padded_keys = tbn_round_up(job->keys, LANES);
    room->padded_values = tbn_round_up(job->value_width, LANES);
    room->keys = tbn_take(&scratch, width * room->padded_keys * sizeof(float));
    room->values = tbn_take(&scratch, job->keys * room->padded_values * sizeof(float));
    room->scores = tbn_take(&scratch, QUERIES * room->padded_keys * sizeof(float));
    room->sums = tbn_take(&scratch, QUERIES * room->padded_values * sizeof(float));
    room->rest = tbn_take(&scratch, LANES * LANES * sizeof(float));
    return scratch.used;
}

static size_t room_of(const struct tbn_attention *job) {
    struct room room;
    return cut(job, NULL, &room);
}

TARGET static void pack_values(const struct tbn_attention *job, struct tbn_vectors values, const struct room *room) {
    for (size_t j = 0; j < job->keys; j++) {
        const float *from = values.begin + j * values.next;
        float *to = room->values + j * room->padded_values;
        for (size_t i = 0; i < job->value_width; i += LANES)
            _mm512_store_ps(to + i, _mm512_maskz_loadu_ps(first_lanes(job->value_width - i), from + i));
    }
}

TARGET static void pack_keys(const struct tbn_attention *job, struct tbn_vectors keys, const struct room *room) {
    for (size_t j = 0; j < job->keys; j += LANES) {
        const size_t count = tbn_min(job->keys - j, LANES);
        for (size_t i = 0; i < job->width; i += LANES) {
            const float *from = keys.begin + j * keys.next + i;
            size_t stride = keys.next;
            if (count < LANES || job->width - i < LANES) { /* what is not there is zeros */
                const __mmask16 mask = first_lanes(job->width - i);
                for (size_t row = 0; row < LANES; row++)
                    _mm512_store_ps(room->rest + row * LANES,
                                    row < count ? _mm512_maskz_loadu_ps(mask, from + row * stride)
                                                : _mm512_setzero_ps());
                from = room->rest;
                stride = LANES;
            }
            transpose_block(from, stride, room->keys + i * room->padded_keys + j, room->padded_keys);
        }
    }
}

/* out[row][column] = sum over k of rows[row][k] * matrix[k][column], of `vectors` vectors; constant where it is inlined. */
INLINE void multiply_block(const float *const *rows, const float *matrix, size_t stride, size_t depth, float *out,
                           size_t out_stride, const size_t vectors) {
    __m512 sum[QUERIES][MAX_VECTORS];
    UNROLL for (size_t row = 0; row < QUERIES; row++)
        UNROLL for (size_t v = 0; v < vectors; v++)
            sum[row][v] = _mm512_setzero_ps();
    for (size_t k = 0; k < depth; k++, matrix += stride) {
        __m512 column[MAX_VECTORS];
        UNROLL for (size_t v = 0; v < vectors; v++)
            column[v] = _mm512_load_ps(matrix + v * LANES);
        UNROLL for (size_t row = 0; row < QUERIES; row++) {
            const __m512 value = _mm512_set1_ps(rows[row][k]);
            UNROLL for (size_t v = 0; v < vectors; v++)
                sum[row][v] = _mm512_fmadd_ps(value, column[v], sum[row][v]);
        }
    }
    UNROLL for (size_t row = 0; row < QUERIES; row++)
        UNROLL for (size_t v = 0; v < vectors; v++)
            _mm512_store_ps(out + row * out_stride + v * LANES, sum[row][v]);
}

TARGET static void multiply(const float *const *rows, const float *matrix, size_t stride, size_t depth, size_t columns,
                            float *out, size_t out_stride) {
    size_t i = 0;
    for (; i + 4 * LANES <= columns; i += 4 * LANES)
        multiply_block(rows, matrix + i, stride, depth, out + i, out_stride, 4);
    if (columns - i > 2 * LANES)
        multiply_block(rows, matrix + i, stride, depth, out + i, out_stride, 3);
    else if (columns - i > LANES)
        multiply_block(rows, matrix + i, stride, depth, out + i, out_stride, 2);
    else if (columns > i)
        multiply_block(rows, matrix + i, stride, depth, out + i, out_stride, 1);
}

/* exp of numbers that are 0 or less; a NaN stays one. */
INLINE __m512 exponential(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-110.0f), x); /* below, e^x is 0, and its integer part would be none */
    const __m512 whole = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    __m512 r = _mm512_fnmadd_ps(whole, _mm512_set1_ps(0x1.62e4p-1f), x); /* ln 2 in two parts */
    r = _mm512_fnmadd_ps(whole, _mm512_set1_ps(0x1.7f7d1cp-20f), r);
    __m512 y = _mm512_set1_ps(1.0f / 5040);
    const float coefficients[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    UNROLL for (int i = 0; i < 7; i++)
        y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(coefficients[i]));
    return _mm512_scalef_ps(y, whole);
}

/* Scores become exponentials of what they are less than the largest, in place, and zeros from `count` on; their sum. */
TARGET static float weigh(float *scores, size_t count, size_t padded, float scale, const float *added, size_t step) {
    const __m512 factor = _mm512_set1_ps(scale);
    __m512 most = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
    for (size_t i = 0; i < count; i += LANES) {
        const __mmask16 mask = first_lanes(count - i);
        __m512 scaled = _mm512_mul_ps(_mm512_load_ps(scores + i), factor);
        if (added)
            scaled = _mm512_add_ps(scaled, step ? _mm512_maskz_loadu_ps(mask, added + i) : _mm512_set1_ps(*added));
        _mm512_store_ps(scores + i, scaled);
        most = _mm512_mask_max_ps(most, mask, scaled, most);
    }
    float first = _mm512_reduce_max_ps(most);
    if (added && first == -INFINITY)
        first = 0.0f; /* all weights are 0 then, and their sum */
    const __m512 largest = _mm512_set1_ps(first);
    for (size_t i = 0; i < padded; i += LANES) {
        const __mmask16 mask = i < count ? first_lanes(count - i) : 0;
        const __m512 value = exponential(_mm512_sub_ps(_mm512_load_ps(scores + i), largest));
        sum = _mm512_mask_add_ps(sum, mask, sum, value);
        _mm512_store_ps(scores + i, _mm512_maskz_mov_ps(mask, value));
    }
    return _mm512_reduce_add_ps(sum);
}

TARGET static void head(const struct tbn_attention *job, struct tbn_vectors query, struct tbn_vectors key,
                        struct tbn_vectors value, const float *mask, size_t begin, size_t end, float *out,
                        size_t out_next, void *memory) {
    struct room room;
    cut(job, memory, &room);
    pack_keys(job, key, &room);
    pack_values(job, value, &room);
    for (size_t first = begin; first < end; first += QUERIES) {
        const size_t count = tbn_min(end - first, QUERIES);
        const size_t seen = job->causal ? tbn_min(first + count, job->keys) : job->keys;
        const float *queries[QUERIES], *weights[QUERIES];
        float sums[QUERIES];
        for (size_t row = 0; row < QUERIES; row++) { /* rows that are missing are the last one again */
            queries[row] = query.begin + (first + tbn_min(row, count - 1)) * query.next;
            weights[row] = room.scores + row * room.padded_keys;
        }
        const size_t padded = tbn_round_up(seen, LANES);
        multiply(queries, room.keys, room.padded_keys, job->width, padded, room.scores, room.padded_keys);
        for (size_t row = 0; row < QUERIES; row++) {
            const size_t met = job->causal ? tbn_min(first + row + 1, seen) : seen;
            const float *added = mask ? mask + (first + tbn_min(row, count - 1)) * job->mask.query : NULL;
            sums[row] = weigh(room.scores + row * room.padded_keys, met, padded, job->scale, added, job->mask.key);
        }
        multiply(weights, room.values, room.padded_values, seen, room.padded_values, room.sums, room.padded_values);
        for (size_t row = 0; row < count; row++) {
            const __m512 factor = _mm512_set1_ps(mask && sums[row] == 0.0f ? 0.0f : 1.0f / sums[row]);
            float *result = out + (first + row) * out_next;
            for (size_t i = 0; i < job->value_width; i += LANES)
                _mm512_mask_storeu_ps(
                    result + i, first_lanes(job->value_width - i),
                    _mm512_mul_ps(_mm512_load_ps(room.sums + row * room.padded_values + i), factor));
        }
    }
}

const struct tbn_attention_kernels tbn_attention_avx512 = {QUERIES, room_of, head};

#endif
