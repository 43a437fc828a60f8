/*
 * What products of bytes need beside the products (struct tbn_dots), in plain C that compilers turn into vectors of the
 * including level, which defines TARGET and INLINE. Numbers that the compiler knows choose one of several loops.
 */
#ifndef TBN_DOTS_PLAIN_H
#define TBN_DOTS_PLAIN_H

#include "generic.h"

static void nothing(void) {
}

/* An int8 value as a byte. A NaN becomes some value. */
INLINE uint8_t byte_value(float x) {
    const float shift = 12582912.0f; /* as in int8_value */
    x = x < 127.0f ? x : 127.0f;
    x = x > -127.0f ? x : -127.0f;
    return (uint8_t)((int32_t)((x + shift) - shift) + TBN_DOT_ZERO);
}

INLINE uint8_t sign_byte(float x) {
    return x > 0.0f ? TBN_DOT_ZERO + 1 : TBN_DOT_ZERO - 1;
}

TARGET static float measure(const float *x, size_t count, enum tbn_activation activation, const float *fixed,
                            float *factor) {
    if (activation == TBN_FLOAT) { /* sums stay away from float's end */
        const uint32_t limit = (127 + 100) << 23; /* 2^100 */
        *factor = 1.0f;
        return largest_magnitude(x, count) < limit ? 1.0f : NAN;
    }
    return measure_token(x, count, activation == TBN_BINARY, fixed, factor);
}

INLINE void bytes_of(const float *x, size_t count, enum tbn_activation activation, float factor,
                     uint8_t *restrict out) {
    if (activation == TBN_BINARY)
        for (size_t i = 0; i < count; i++)
            out[i] = sign_byte(x[i]);
    else
        for (size_t i = 0; i < count; i++)
            out[i] = byte_value(x[i] * factor);
}

TARGET static void bytes(const float *x, size_t count, enum tbn_activation activation, float factor, uint8_t *out,
                         size_t apart) {
    (void)apart; /* there is one limb */
    if (activation == TBN_FLOAT)
        memcpy(out, x, count * sizeof *x);
    else if (activation == TBN_BINARY)
        bytes_of(x, count, TBN_BINARY, factor, out);
    else if (factor == 0.0f) /* products with infinities and NaN are none */
        memset(out, TBN_DOT_ZERO, count);
    else
        bytes_of(x, count, TBN_INT8, factor, out);
}

/* Positions whose bytes are made at once, plane by plane, before they change places. */
enum { SOME_POSITIONS = 32 };

/* The same of floats as they are. */
INLINE void floats_of_planes(const float *x, size_t plane, size_t channels, size_t positions, uint8_t *out,
                             size_t stride) {
    size_t channel = 0, position;
    for (; channel + TBN_BATCH <= channels; channel += TBN_BATCH)
        for (position = 0; position + TBN_BATCH <= positions; position += TBN_BATCH)
            transpose_block(x + channel * plane + position, plane,
                            (float *)(void *)(out + position * stride) + channel, stride / sizeof(float));
    for (size_t i = 0; i < channels; i++)
        for (position = i < channel ? positions - positions % TBN_BATCH : 0; position < positions; position++)
            memcpy(out + position * stride + i * sizeof(float), x + i * plane + position, sizeof(float));
}

TARGET static void bytes_of_planes(const float *x, size_t plane, size_t channels, size_t positions,
                                   enum tbn_activation activation, float factor, uint8_t *out, size_t stride,
                                   size_t apart) {
    if (activation == TBN_FLOAT) {
        floats_of_planes(x, plane, channels, positions, out, stride);
        return;
    }
    uint8_t row[4][SOME_POSITIONS];
    for (size_t first = 0; first < positions; first += SOME_POSITIONS) {
        const size_t count = positions - first < SOME_POSITIONS ? positions - first : SOME_POSITIONS;
        uint8_t *place = out + first * stride;
        for (size_t channel = 0; channel < channels; channel += 4) {
            const size_t some = channels - channel < 4 ? channels - channel : 4;
            for (size_t i = 0; i < some; i++)
                bytes(x + (channel + i) * plane + first, count, activation, factor, row[i], apart);
            if (some == 4)
                for (size_t j = 0; j < count; j++) {
                    const uint8_t four[4] = {row[0][j], row[1][j], row[2][j], row[3][j]};
                    memcpy(place + j * stride + channel, four, 4);
                }
            else
                for (size_t j = 0; j < count; j++)
                    for (size_t i = 0; i < some; i++)
                        place[j * stride + channel + i] = row[i][j];
        }
    }
}

/* The sum of a row and an input: a float, or an integer and its correction. */
INLINE float sum_of(const int32_t *z, const int32_t *correction, size_t row) {
    float sum;
    if (correction)
        return (float)(z[row] + correction[row]);
    memcpy(&sum, z + row, sizeof sum);
    return sum;
}

/* The order of the products is the reference's: (z * alpha) * scale + bias. A NaN is no smaller than 0 and stays. */
INLINE void finish_input(const struct tbn_dot_finish *job, const int32_t *restrict z, const int32_t *restrict correction,
                         size_t rows, float scale, float *restrict out, int has_bias, int relu) {
    for (size_t row = 0; row < rows; row++)
        out[row] = finish_one(sum_of(z, correction, row), job->alpha[row], scale, has_bias ? job->bias + row : NULL, relu);
}

TARGET static void finish_inputs(const struct tbn_dot_finish *job, const int32_t *z, size_t z_stride, size_t rows,
                                 size_t inputs, float *out, size_t step) {
    for (size_t i = 0; i < inputs; i++, z += z_stride, out += step) {
        const float scale = job->scales[i * job->scale_step];
        if (job->bias)
            finish_input(job, z, job->correction, rows, scale, out, 1, job->relu);
        else
            finish_input(job, z, job->correction, rows, scale, out, 0, job->relu);
    }
}

TARGET static void finish_by_rows(const struct tbn_dot_finish *job, const int32_t *z, size_t z_stride, size_t rows,
                                  size_t outputs, size_t inputs, float *out, size_t step) {
    _Alignas(TBN_ALIGN) float by_input[TBN_DOT_INPUTS * TBN_DOT_ROWS], by_row[TBN_DOT_ROWS * TBN_DOT_INPUTS];
    memset(by_input, 0, sizeof by_input);
    for (size_t first = 0; first < rows; first += TBN_DOT_ROWS) {
        const size_t some = rows - first < TBN_DOT_ROWS ? rows - first : TBN_DOT_ROWS;
        const int32_t *correction = job->correction ? job->correction + first : NULL;
        for (size_t i = 0; i < inputs; i++)
            for (size_t row = 0; row < some; row++)
                by_input[i * TBN_DOT_ROWS + row] = sum_of(z + i * z_stride + first, correction, row);
        transpose_block(by_input, TBN_DOT_ROWS, by_row, TBN_DOT_INPUTS);
        for (size_t row = 0; row < some; row++)
            for (size_t output = first + row; output < outputs; output += rows)
                finish_channel(by_row + row * TBN_DOT_INPUTS, inputs, job->alpha[output], job->scales[0],
                               job->bias ? job->bias + output : NULL, job->relu, out + output * step);
    }
}

/* `rounds`, `has_bias`, `adds`: whether results are rounded, and have a bias or something added: floats 1, bytes 2. */
INLINE void store_input(const struct tbn_dot_finish *job, const struct tbn_dot_store *store, const int32_t *restrict z,
                        size_t rows, size_t i, int rounds, int has_bias, int adds, float *restrict floats,
                        uint8_t *restrict out) {
    const float *restrict alpha = job->alpha, *restrict bias = job->bias;
    const int32_t *restrict correction = job->correction;
    const float *restrict added = adds == 1 ? store->added + i * store->added_step : NULL;
    const uint8_t *restrict added_bytes = adds == 2 ? store->added_bytes + i * store->added_step : NULL;
    const float scale = job->scales[0], rounded = store->rounded, rounded_factor = store->rounded_factor;
    const float added_scale = store->added_scale, factor = store->factor;
    const int finish_relu = job->relu, relu = store->relu;
    for (size_t row = 0; row < rows; row++) {
        float value = finish_one(sum_of(z, correction, row), alpha[row], scale, has_bias ? bias + row : NULL, finish_relu);
        if (rounds)
            value = (float)((int32_t)byte_value(value * rounded_factor) - TBN_DOT_ZERO) * rounded;
        if (adds == 1)
            value += added[row];
        if (adds == 2)
            value += (float)((int32_t)added_bytes[row] - TBN_DOT_ZERO) * added_scale;
        value = relu && value < 0.0f ? 0.0f : value;
        if (floats)
            floats[row] = value;
        if (out)
            out[row] = byte_value(value * factor);
    }
}

INLINE void store_all(const struct tbn_dot_finish *job, const struct tbn_dot_store *store, const int32_t *z,
                      size_t z_stride, size_t rows, size_t inputs, int rounds, int has_bias, int adds, int keeps,
                      int bytes) {
    for (size_t i = 0; i < inputs; i++, z += z_stride)
        store_input(job, store, z, rows, i, rounds, has_bias, adds, keeps ? store->floats + i * store->floats_step : NULL,
                    bytes ? store->bytes + i * store->bytes_step : NULL);
}

TARGET static void store_inputs(const struct tbn_dot_finish *job, const struct tbn_dot_store *store, const int32_t *z,
                                size_t z_stride, size_t rows, size_t inputs) {
    const int rounds = store->rounded_factor != 0.0f, adds = store->added ? 1 : store->added_bytes ? 2 : 0;
    const int bias = job->bias != NULL;
    if (!store->floats && bias && rounds && adds == 2)
        store_all(job, store, z, z_stride, rows, inputs, 1, 1, 2, 0, 1);
    else if (!store->floats && bias && !rounds && adds == 2)
        store_all(job, store, z, z_stride, rows, inputs, 0, 1, 2, 0, 1);
    else if (!store->floats && bias && !rounds && adds == 0)
        store_all(job, store, z, z_stride, rows, inputs, 0, 1, 0, 0, 1);
    else
        store_all(job, store, z, z_stride, rows, inputs, rounds, bias, adds, store->floats != NULL,
                  store->bytes != NULL);
}

INLINE void max_bytes(const uint8_t *const *from, size_t taps, size_t count, uint8_t *restrict out) {
    memset(out, 0, count);
    for (size_t tap = 0; tap < taps; tap++) {
        const uint8_t *restrict values = from[tap];
        for (size_t i = 0; i < count; i++)
            out[i] = values[i] > out[i] ? values[i] : out[i];
    }
}

TARGET static void max_floats(const float *const *from, size_t taps, size_t count, float *restrict out) {
    for (size_t i = 0; i < count; i++)
        out[i] = -INFINITY;
    for (size_t tap = 0; tap < taps; tap++) {
        const float *restrict values = from[tap];
        for (size_t i = 0; i < count; i++)
            out[i] = values[i] < out[i] ? out[i] : values[i]; /* a NaN is taken, and a number after it */
    }
}

#endif
