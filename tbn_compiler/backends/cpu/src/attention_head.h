/*
 * Attention of one head. Keys are transposed once, so that a few queries meet a vector of keys at once; a row of the scores
 * becomes weights where it lies, and these meet the values, a vector of their floats at once. Both products are of one kind:
 * rows of numbers that are broadcast, and a matrix whose rows fill vectors.
 *
 * The including level defines `vector`, LANES floats, and `lanes`, some of them, and functions of them; QUERIES, that are
 * computed at once, and MAX_VECTORS, 2 or 4, that sums of each have in registers; and transpose_lanes, of LANES x LANES floats.
 */
#ifndef TBN_ATTENTION_HEAD_H
#define TBN_ATTENTION_HEAD_H

#include "scratch.h"

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
            store(to + i, load_some(from + i, first_lanes(job->value_width - i)));
    }
}

TARGET static void pack_keys(const struct tbn_attention *job, struct tbn_vectors keys, const struct room *room) {
    for (size_t j = 0; j < job->keys; j += LANES) {
        const size_t count = tbn_min(job->keys - j, LANES);
        for (size_t i = 0; i < job->width; i += LANES) {
            const float *from = keys.begin + j * keys.next + i;
            size_t stride = keys.next;
            if (count < LANES || job->width - i < LANES) { /* what is not there is zeros */
                const lanes mask = first_lanes(job->width - i);
                for (size_t row = 0; row < LANES; row++)
                    store(room->rest + row * LANES, row < count ? load_some(from + row * stride, mask) : same(0.0f));
                from = room->rest;
                stride = LANES;
            }
            transpose_lanes(from, stride, room->keys + i * room->padded_keys + j, room->padded_keys);
        }
    }
}

/* out[row][column] = sum over k of rows[row][k] * matrix[k][column], of `vectors` vectors; constant where it is inlined. */
INLINE void multiply_block(const float *const *rows, const float *matrix, size_t stride, size_t depth, float *out,
                           size_t out_stride, const size_t vectors) {
    vector sum[QUERIES][MAX_VECTORS];
    UNROLL for (size_t row = 0; row < QUERIES; row++)
        UNROLL for (size_t v = 0; v < vectors; v++)
            sum[row][v] = same(0.0f);
    for (size_t k = 0; k < depth; k++, matrix += stride) {
        vector column[MAX_VECTORS];
        UNROLL for (size_t v = 0; v < vectors; v++)
            column[v] = load(matrix + v * LANES);
        UNROLL for (size_t row = 0; row < QUERIES; row++) {
            const vector value = same(rows[row][k]);
            UNROLL for (size_t v = 0; v < vectors; v++)
                sum[row][v] = multiply_add(value, column[v], sum[row][v]);
        }
    }
    UNROLL for (size_t row = 0; row < QUERIES; row++)
        UNROLL for (size_t v = 0; v < vectors; v++)
            store(out + row * out_stride + v * LANES, sum[row][v]);
}

TARGET static void multiply(const float *const *rows, const float *matrix, size_t stride, size_t depth, size_t columns,
                            float *out, size_t out_stride) {
    size_t i = 0;
    for (; i + MAX_VECTORS * LANES <= columns; i += MAX_VECTORS * LANES)
        multiply_block(rows, matrix + i, stride, depth, out + i, out_stride, MAX_VECTORS);
#if MAX_VECTORS > 2
    if (columns - i > 2 * LANES)
        multiply_block(rows, matrix + i, stride, depth, out + i, out_stride, 3);
    else if (columns - i > LANES)
        multiply_block(rows, matrix + i, stride, depth, out + i, out_stride, 2);
    else
#endif
    if (columns > i)
        multiply_block(rows, matrix + i, stride, depth, out + i, out_stride, 1);
}

/* exp of numbers that are 0 or less; a NaN stays one. */
INLINE vector exponential(vector x) {
    x = larger_of(same(-110.0f), x, first_lanes(LANES)); /* below, e^x is 0, and its integer part would be none */
    const vector whole = nearest(times(x, same(1.44269504f)));
    vector r = subtract_product(whole, same(0x1.62e4p-1f), x); /* ln 2 in two parts */
    r = subtract_product(whole, same(0x1.7f7d1cp-20f), r);
    vector y = same(1.0f / 5040);
    const float coefficients[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    UNROLL for (int i = 0; i < 7; i++)
        y = multiply_add(y, r, same(coefficients[i]));
    return times_power(y, whole);
}

/* Scores become exponentials of what they are less than the largest, in place, and zeros from `count` on; their sum. */
TARGET static float weigh(float *scores, size_t count, size_t padded, float scale, const float *added, size_t step) {
    const vector factor = same(scale);
    vector most = same(-INFINITY), sum = same(0.0f);
    for (size_t i = 0; i < count; i += LANES) {
        const lanes mask = first_lanes(count - i);
        vector scaled = times(load(scores + i), factor);
        if (added)
            scaled = plus(scaled, step ? load_some(added + i, mask) : same(*added));
        store(scores + i, scaled);
        most = larger_of(scaled, most, mask);
    }
    float first = largest_of(most);
    if (added && first == -INFINITY)
        first = 0.0f; /* all weights are 0 then, and their sum */
    const vector largest = same(-first);
    for (size_t i = 0; i < padded; i += LANES) {
        const lanes mask = first_lanes(i < count ? count - i : 0);
        const vector value = only(exponential(plus(load(scores + i), largest)), mask);
        sum = plus(sum, value);
        store(scores + i, value);
    }
    return sum_of(sum);
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
            const vector factor = same(mask && sums[row] == 0.0f ? 0.0f : 1.0f / sums[row]);
            float *result = out + (first + row) * out_next;
            for (size_t i = 0; i < job->value_width; i += LANES)
                store_some(result + i, times(load(room.sums + row * room.padded_values + i), factor),
                           first_lanes(job->value_width - i));
        }
    }
}

#endif
