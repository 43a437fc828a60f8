/*
 * Compares the kernels of one level with plain loops on random layers. Inputs are multiples of 1/8, so that float sums
 * are exact in any order; some tokens hold infinities, NaN, or numbers so large that partial sums overflow. Run on its
 * own: under an emulator for other machines, or with the compiler's sanitizers.
 *
 *     check_level LEVEL      # exit status 0: all equal; prints a checksum of all results, equal wherever a level runs
 */
#include "scratch.h"
#include "tbn_cpu.h"
#include "wide.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static uint32_t state = 1;

static uint32_t random_below(uint32_t limit) {
    state = state * 1664525u + 1013904223u;
    return (state >> 8) % limit;
}

static size_t between(uint32_t low, uint32_t high) {
    return low + random_below(high - low + 1);
}

static void *memory(size_t bytes) {
    void *block = tbn_allocate(bytes + 1);
    if (!block)
        abort();
    return block;
}

static float *random_floats(size_t count) {
    float *values = memory(count * sizeof(float));
    for (size_t i = 0; i < count; i++)
        values[i] = ((float)random_below(17) - 8.0f) / 8.0f;
    return values;
}

static uint64_t checksum = 14695981039346656037u; /* FNV-1a, of words */

/* Adds the bits of results; those of a NaN are the processor's own. */
static void add_to_checksum(const float *values, size_t count) {
    for (size_t i = 0; i < count; i++) {
        uint32_t bits = 0x7fc00000u;
        if (!isnan(values[i]))
            memcpy(&bits, values + i, sizeof bits);
        checksum = (checksum ^ bits) * 1099511628211u;
    }
}

/* Leaves `count` inputs as they are, or makes some infinite or NaN, or all of them zeros and multiples of 2^126. */
static void make_special(float *x, size_t count) {
    const uint32_t kind = random_below(4);
    for (size_t i = 0; kind == 1 && i < count; i++)
        x[i] = random_below(4) ? 0.0f : ((float)random_below(7) - 3.0f) * 0x1p126f;
    for (size_t i = 0; kind == 2 && i < 2; i++)
        x[random_below((uint32_t)count)] = random_below(3) ? (random_below(2) ? INFINITY : -INFINITY) : NAN;
}

static int differ(float value, double expected, int relu) {
    const float rounded = relu && expected < 0.0 ? 0.0f : (float)expected;
    return isnan(value) || isnan(rounded) ? isnan(value) != isnan(rounded) : value != rounded;
}

static int8_t *random_signs(size_t count) {
    int8_t *signs = memory(count);
    for (size_t i = 0; i < count; i++)
        signs[i] = random_below(2) ? 1 : -1;
    return signs;
}

/* In double, except for the scales of integers, whose products round in a given order. */
static double finish(double sum, int activation, float alpha, float scale, float bias) {
    return activation == TBN_FLOAT ? sum * (double)alpha + (double)bias
                                   : (double)((float)sum * alpha * scale + bias);
}

/* The scale that all inputs have, or NULL. */
static const float *some_scale(int activation) {
    static const float scales[] = {1.0f / 128.0f, 0.01f, 0x1p120f};
    return activation == TBN_FLOAT || random_below(2) ? NULL : &scales[random_below(3)];
}

/* Integers and scale of one token, as the library quantises them at its lowest level. */
static float to_integers(const float *x, size_t count, int activation, const float *fixed, float *values) {
    if (activation == TBN_FLOAT) {
        memcpy(values, x, count * sizeof(float));
        return 1.0f;
    }
    int16_t *q = memory(count * sizeof *q);
    const float scale = tbn_level("portable")->quantize(x, count, activation == TBN_BINARY, fixed, q);
    for (size_t i = 0; i < count; i++)
        values[i] = (float)q[i];
    tbn_free(q);
    return scale;
}

/* 1, 2, 4 or 8 column groups. */
static size_t some_mixes(void) {
    return (size_t)1 << (random_below(2) ? 0 : between(1, 3));
}

static int hadamard(size_t row, size_t column) {
    return tbn_hadamard(row, column) ? -1 : 1;
}

/* Bits of rows of `steps` steps of weights in the order in which products read them; weights [group][row][step][byte]. */
static uint8_t *dot_index(const struct tbn_kernels *kernels, const int8_t *weights, size_t groups, size_t rows, size_t steps) {
    const size_t blocks = (rows + TBN_DOT_ROWS - 1) / TBN_DOT_ROWS;
    uint8_t *index = memory(groups * blocks * steps * TBN_DOT_STEP / 8);
    memset(index, 0, groups * blocks * steps * TBN_DOT_STEP / 8);
    for (size_t i = 0; i < groups * rows * steps * TBN_DOT_BYTES; i++) {
        const size_t byte = i % TBN_DOT_BYTES, step = i / TBN_DOT_BYTES % steps;
        const size_t row = i / TBN_DOT_BYTES / steps % rows, group = i / TBN_DOT_BYTES / steps / rows;
        const size_t place = ((group * blocks + row / TBN_DOT_ROWS) * steps + step) * TBN_DOT_BYTES / 4 + byte / 4;
        const size_t by_block = (place * TBN_DOT_ROWS + row % TBN_DOT_ROWS) * 4 + byte % 4;
        const size_t by_row = ((group * steps + step) * blocks * TBN_DOT_ROWS + row) * TBN_DOT_BYTES + byte;
        const size_t bit = tbn_dots_by_rows(kernels) ? by_row : by_block;
        index[bit / 8] = (uint8_t)(index[bit / 8] | (weights[i] > 0) << bit % 8);
    }
    return index;
}

/* What the zero of bytes adds to the sums of rows, taken off; [mixes][rows], mixed. */
static int32_t *dot_corrections(const struct tbn_kernels *kernels, const int8_t *bytes, size_t mixes, size_t rows,
                                size_t row_bytes) {
    int32_t *corrections = memory(mixes * rows * sizeof *corrections);
    for (size_t copy = 0; copy < mixes; copy++)
        for (size_t row = 0; row < rows; row++) {
            int32_t sum = 0;
            for (size_t mix = 0; mix < mixes; mix++)
                for (size_t i = 0; i < row_bytes; i++)
                    sum += hadamard(copy, mix) * bytes[(mix * rows + row) * row_bytes + i];
            corrections[copy * rows + row] = tbn_dots_by_rows(kernels) ? 0 : -TBN_DOT_ZERO * sum;
        }
    return corrections;
}

static int check_linear(const struct tbn_kernels *kernels, int activation) {
    const size_t mixes = some_mixes(), columns = between(1, 600) / mixes + 1, inputs = columns * mixes;
    const size_t rows = random_below(4) ? between(1, 150) : between(160, 170);
    const size_t copies = mixes > 1 ? mixes : between(1, 3), tokens = between(0, 40);
    const size_t outputs = rows * copies;
    int8_t *signs = random_signs(rows * inputs); /* [column group][row][column] */
    float *x = random_floats(tokens * inputs), *alpha = random_floats(outputs), *bias = random_floats(outputs);
    float *out = memory(tokens * outputs * sizeof(float)), *values = memory(inputs * sizeof(float));
    const float *scale_of_all = some_scale(activation);
    const size_t bytes = tbn_pack_bytes(kernels, activation != TBN_FLOAT, rows, columns);
    const size_t sums_bytes = tbn_pack_sums_bytes(rows, columns);
    char *index = memory(mixes * bytes), *sums_index = memory(mixes * sums_bytes);
    for (size_t group = 0; group < mixes; group++) {
        tbn_pack(kernels, activation != TBN_FLOAT, signs + group * rows * columns, rows, columns, index + group * bytes);
        tbn_pack_sums(signs + group * rows * columns, rows, columns, sums_index + group * sums_bytes);
    }
    const struct tbn_linear layer = {
        .kernels = kernels, .index = index, .sums_index = random_below(2) ? sums_index : NULL, .inputs = inputs,
        .rows = rows, .copies = copies, .mixes = mixes, .alpha_copy_stride = rows, .alpha_row_stride = 1,
        .activation = activation, .relu = 1};
    for (size_t token = 0; token < tokens; token++)
        make_special(x + token * inputs, inputs);
    int wrong = 0;
    if (activation != TBN_FLOAT && tbn_has_dots(kernels) && random_below(2)) {
        const size_t steps = (columns + TBN_DOT_BYTES - 1) / TBN_DOT_BYTES, row_bytes = steps * TBN_DOT_BYTES;
        int8_t *spread = memory(mixes * rows * row_bytes);
        memset(spread, -1, mixes * rows * row_bytes); /* what fills up meets inputs of 0 */
        for (size_t i = 0; i < rows * inputs; i++)
            spread[i / columns * row_bytes + i % columns] = signs[i];
        struct tbn_linear dots = layer;
        uint8_t *order = dot_index(kernels, spread, mixes, rows, steps);
        int32_t *corrections = dot_corrections(kernels, spread, mixes, rows, row_bytes);
        dots.index = order;
        dots.corrections = corrections;
        wrong += tbn_linear_dots(&dots, x, out, tokens, alpha, bias, scale_of_all, between(1, 3)) != TBN_OK;
        tbn_free(spread), tbn_free(order), tbn_free(corrections);
    } else
        wrong += tbn_linear(&layer, x, out, tokens, alpha, bias, scale_of_all, between(1, 3)) != TBN_OK;
    add_to_checksum(out, tokens * outputs);
    for (size_t token = 0; token < tokens; token++) {
        const float scale = to_integers(x + token * inputs, inputs, activation, scale_of_all, values);
        for (size_t output = 0; output < outputs; output++) {
            double sum = 0.0;
            for (size_t i = 0; i < inputs; i++) {
                const int8_t *row = signs + (i % mixes * rows + output % rows) * columns;
                sum += (double)(row[i / mixes] * hadamard(output / rows, i % mixes)) * (double)values[i];
            }
            const double expected = finish(sum, activation, alpha[output], scale, bias[output]);
            wrong += differ(out[token * outputs + output], expected, 1);
        }
    }
    tbn_free(signs), tbn_free(x), tbn_free(alpha), tbn_free(bias), tbn_free(out), tbn_free(values), tbn_free(index), tbn_free(sums_index);
    if (wrong)
        printf("linear, activation %d, rows %zu, inputs %zu, mixes %zu, tokens %zu: %d wrong\n", activation, rows,
               inputs, mixes, tokens, wrong);
    return wrong;
}

/* The same layer as products of bytes, its images in one of the two orders, and folded or not. */
static int conv_dots(struct tbn_conv *layer, const int8_t *signs, size_t group, const float *x, float *out,
                     size_t samples, size_t height, size_t width, float alpha, const float *scale) {
    const size_t mixes = layer->mixes, rows = layer->rows, taps = layer->kernel[0] * layer->kernel[1];
    const size_t padded = (layer->channels + 3) / 4 * 4, columns = (layer->channels + group - 1) / group * taps * group;
    const size_t folded = random_below(2), width_places = layer->dilation[1] == 1 ? layer->kernel[1] : 1;
    const size_t places = width_places * (folded ? layer->kernel[0] : 1); /* in a run */
    const size_t run_bytes = (places * padded + TBN_DOT_BYTES - 1) / TBN_DOT_BYTES * TBN_DOT_BYTES;
    const size_t row_bytes = taps / places * run_bytes;
    int8_t *bytes = memory(mixes * rows * row_bytes);
    memset(bytes, 0, mixes * rows * row_bytes);
    for (size_t row = 0; row < mixes * rows; row++) {
        for (size_t run = 0; run < taps / places; run++) /* channels that fill up meet inputs of 0 */
            memset(bytes + row * row_bytes + run * run_bytes, -1, places * padded);
        for (size_t tap = 0; tap < taps; tap++) {
            /* Folded, a column of the kernel comes after the other. */
            const size_t place = folded ? tap % layer->kernel[1] * layer->kernel[0] + tap / layer->kernel[1] : tap;
            for (size_t c = 0; c < layer->channels; c++)
                bytes[row * row_bytes + place / places * run_bytes + place % places * padded + c] =
                    signs[row * columns + (c / group * taps + tap) * group + c % group];
        }
    }
    uint8_t *order = dot_index(layer->kernels, bytes, mixes, rows, row_bytes / TBN_DOT_BYTES);
    int32_t *corrections = dot_corrections(layer->kernels, bytes, mixes, rows, row_bytes);
    struct tbn_conv dots = *layer;
    dots.index = order;
    dots.corrections = corrections;
    dots.lookups = layer;
    dots.folded = (int32_t)folded;
    dots.channels_last = layer->channels_last = (int32_t)random_below(2);
    const size_t channels = mixes * layer->channels, plane = height * width;
    float *last = memory(samples * channels * plane * sizeof *last);
    for (size_t i = 0; i < samples * channels * plane; i++)
        last[(i / plane / channels * plane + i % plane) * channels + i / plane % channels] = x[i];
    const int status = tbn_conv_dots(&dots, dots.channels_last ? last : x, out, samples, height, width, &alpha, NULL,
                                     scale, between(1, 3));
    tbn_free(bytes), tbn_free(order), tbn_free(corrections), tbn_free(last);
    return status != TBN_OK;
}

static int check_conv(const struct tbn_kernels *kernels, int activation) {
    const int integer = activation != TBN_FLOAT;
    const size_t group = tbn_group(kernels, integer), rows = between(1, 70), mixes = some_mixes();
    /* Of a column group; tables of pixels are shared from TBN_DOT_BYTES on. */
    const size_t channels = mixes > 2 || random_below(4) ? between(1, 40) / mixes + 1 : TBN_DOT_BYTES;
    const size_t height = between(6, 12), width = between(6, 20), samples = between(1, 2);
    struct tbn_conv layer = {
        .kernels = kernels, .groups = 1, .channels = channels, .channels_out = mixes * rows, .rows = rows,
        .mixes = mixes, .alpha_rows = mixes * rows,
        .kernel = {between(1, 3), between(1, 3)}, .stride = {between(1, 3), between(1, 3)},
        .padding = {between(0, 2), between(0, 2)}, .dilation = {between(1, 2), between(1, 2)},
        .activation = activation};
    const size_t taps = layer.kernel[0] * layer.kernel[1], channel_groups = (channels + group - 1) / group;
    const size_t columns = channel_groups * taps * group;
    int8_t *signs = random_signs(mixes * rows * columns); /* [column group][filter][channel group][tap][channel] */
    const size_t bytes = tbn_pack_bytes(kernels, integer, rows, columns);
    char *index = memory(mixes * bytes);
    for (size_t mix = 0; mix < mixes; mix++)
        tbn_pack(kernels, integer, signs + mix * rows * columns, rows, columns, index + mix * bytes);
    layer.index = index;
    size_t sizes[2] = {height, width};
    for (int axis = 0; axis < 2; axis++)
        sizes[axis] = (sizes[axis] + 2 * layer.padding[axis] - layer.dilation[axis] * (layer.kernel[axis] - 1) - 1) /
                          layer.stride[axis] + 1;
    const size_t size = mixes * channels * height * width, plane = sizes[0] * sizes[1], outputs = mixes * rows * plane;
    float *x = random_floats(samples * size), *out = memory(samples * outputs * sizeof(float));
    float *values = memory(size * sizeof(float));
    const float alpha = 0.75f, *scale_of_all = some_scale(activation);
    for (size_t sample = 0; sample < samples; sample++)
        make_special(x + sample * size, size);
    int wrong = 0;
    size_t position = 1, channel_step = plane; /* between outputs of one channel, and of one position */
    if (tbn_has_dots(kernels) && (integer || tbn_has_limbs(kernels) || tbn_keeps_floats(kernels)) && random_below(2)) {
        wrong += conv_dots(&layer, signs, group, x, out, samples, height, width, alpha, scale_of_all);
        if (layer.channels_last) {
            position = mixes * rows;
            channel_step = 1;
        }
    } else
        wrong += tbn_conv(&layer, x, out, samples, height, width, &alpha, NULL, scale_of_all, between(1, 3)) != TBN_OK;
    add_to_checksum(out, samples * outputs);
    for (size_t sample = 0; sample < samples; sample++) {
        const float scale = to_integers(x + sample * size, size, activation, scale_of_all, values);
        for (size_t i = 0; i < outputs; i++) {
            const size_t copy = i / plane / rows, filter = i / plane % rows;
            const size_t out_y = i % plane / sizes[1], out_x = i % sizes[1];
            double sum = 0.0;
            for (size_t c = 0; c < channels * mixes; c++)
                for (size_t tap = 0; tap < taps; tap++) {
                    const size_t y = out_y * layer.stride[0] + tap / layer.kernel[1] * layer.dilation[0];
                    const size_t x_padded = out_x * layer.stride[1] + tap % layer.kernel[1] * layer.dilation[1];
                    const size_t mix = c % mixes, channel = c / mixes;
                    const int sign = hadamard(copy, mix) * signs[(mix * rows + filter) * columns +
                                                                 (channel / group * taps + tap) * group + channel % group];
                    if (y - layer.padding[0] < height && x_padded - layer.padding[1] < width)
                        sum += (double)sign * (double)values[(c * height + y - layer.padding[0]) * width + x_padded -
                                                             layer.padding[1]];
                }
            const float result = out[sample * outputs + i % plane * position + i / plane * channel_step];
            wrong += differ(result, finish(sum, activation, alpha, scale, 0.0f), 0);
        }
    }
    tbn_free(signs), tbn_free(index), tbn_free(x), tbn_free(out), tbn_free(values);
    if (wrong)
        printf("conv, activation %d, rows %zu, channels %zu, mixes %zu: %d wrong\n", activation, rows, channels, mixes,
               wrong);
    return wrong;
}

/* Attention differs in its order of sums and its exponentials from machine to machine: it is no part of the checksum. */
static int check_attention(const struct tbn_kernels *kernels) {
    const size_t samples = between(1, 2), heads = between(1, 3), queries = between(1, 60), keys = between(1, 40);
    const size_t width = between(1, 36), value_width = between(1, 70);
    struct tbn_attention job = {samples, heads, queries, keys, width, value_width, 0.25f, (int)random_below(2), {NULL},
                                queries * heads * value_width, value_width, heads * value_width};
    float *mask = random_floats(queries * keys);
    const size_t apart = width + random_below(3), values_apart = value_width + random_below(3);
    float *query = random_floats(samples * heads * queries * apart), *key = random_floats(samples * heads * keys * apart);
    float *value = random_floats(samples * heads * keys * values_apart);
    float *out = memory(samples * heads * queries * value_width * sizeof *out);
    double weights[40];
    int wrong = 0;
    /* [samples][heads], and the operands of all heads side by side */
    const struct tbn_vectors of_query = {query, heads * queries * apart, apart, heads * apart};
    const struct tbn_vectors of_key = {key, heads * keys * apart, apart, heads * apart};
    const struct tbn_vectors of_value = {value, heads * keys * values_apart, values_apart, heads * values_apart};
    if (!job.causal && random_below(2))
        job.mask = (struct tbn_mask){mask, 0, 0, keys, 1}; /* the same for all heads */
    if (tbn_attention(kernels, &job, &of_query, &of_key, &of_value, out, 2) != TBN_OK)
        abort();
    for (size_t unit = 0; unit < samples * heads * queries; unit++) {
        const size_t i = unit % queries, head = unit / queries % heads, sample = unit / queries / heads;
        const size_t met = job.causal && i + 1 < keys ? i + 1 : keys;
        const float *one = query + ((sample * queries + i) * heads + head) * apart;
        double sum = 0.0;
        for (size_t j = 0; j < met; j++) {
            const float *other = key + ((sample * keys + j) * heads + head) * apart;
            double product = 0.0;
            for (size_t k = 0; k < width; k++)
                product += (double)one[k] * (double)other[k];
            weights[j] = exp(product * (double)job.scale + (job.mask.begin ? (double)mask[i * keys + j] : 0.0));
            sum += weights[j];
        }
        for (size_t k = 0; k < value_width; k++) {
            double expected = 0.0;
            for (size_t j = 0; j < met; j++)
                expected += weights[j] / sum * (double)value[((sample * keys + j) * heads + head) * values_apart + k];
            const float found = out[((sample * queries + i) * heads + head) * value_width + k];
            wrong += !(fabs((double)found - expected) < 1e-6);
        }
    }
    if (wrong)
        printf("attention: %d wrong of %zu queries, %zu keys, width %zu, %zu\n", wrong, queries, keys, width, value_width);
    tbn_free(query), tbn_free(key), tbn_free(value), tbn_free(mask), tbn_free(out);
    return wrong;
}

int main(int count, char **arguments) {
    const struct tbn_kernels *kernels = count == 2 ? tbn_level(arguments[1]) : NULL;
    if (!kernels) {
        printf("no such level here\n");
        return 2;
    }
    int wrong = 0;
    for (int i = 0; i < 16; i++)
        for (int activation = TBN_FLOAT; activation <= TBN_BINARY; activation++)
            wrong += check_linear(kernels, activation) + check_conv(kernels, activation);
    for (int i = 0; i < 40 && tbn_has_attention(kernels); i++)
        wrong += check_attention(kernels);
    printf("checksum %016llx\n", (unsigned long long)checksum);
    return wrong != 0;
}
