/*
 * A network of tiled layers on int8 with fixed scales as one call (struct tbn_network).
 *
 * Images between layers stay bytes: a convolution brings its results into the integers that the next layer takes, in
 * images with the borders that it needs, and the next layer reads them where they are. Floats are kept where something
 * else reads them. All values lie in one block of memory, and take the place of those that nothing reads any more.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "dots.h"
#include "pool.h"

/* A value in one call: its sizes and where it is. */
struct image {
    size_t height, width;
    size_t slack; /* bytes behind it that products may read */
    size_t at, size, at_floats;
    struct tbn_bytes bytes;
    float *floats;
};

struct run {
    const struct tbn_network *network;
    const float *x;
    int last; /* whether the channels of x are innermost */
    float *out;
    size_t samples, threads;
    struct image *images;
    float *scales; /* of the samples of x: a NaN where a sample holds one */
};

static size_t pooled(const struct tbn_step *step, int axis, size_t size) {
    return (size + 2 * step->padding[axis] - step->kernel[axis]) / step->stride[axis] + 1;
}

static const struct tbn_conv *conv_of(const struct tbn_step *step) {
    return step->layer->forms[0].layer;
}

static size_t features(const struct tbn_network *network, const struct image *images, size_t value) {
    return network->values[value].channels * images[value].height * images[value].width;
}

/* The sizes of all values; TBN_MISFIT if a kernel does not fit its input, or values that are added differ. */
static int find_sizes(const struct tbn_network *network, struct image *images) {
    for (size_t i = 0; i < network->step_count; i++) {
        const struct tbn_step *step = &network->steps[i];
        struct image *from = &images[step->input], *to = &images[step->output];
        to->height = to->width = 1;
        for (int axis = 0; axis < 2; axis++) {
            const size_t size = axis ? from->width : from->height;
            size_t found = 1;
            if (step->kind == TBN_STEP_CONV) {
                const struct tbn_conv *layer = conv_of(step);
                if (size == 0 || size + 2 * layer->padding[axis] <= tbn_reach(layer, axis))
                    return TBN_MISFIT;
                found = tbn_output_size(layer, axis, size);
            } else if (step->kind == TBN_STEP_MAX_POOL) {
                if (size + 2 * step->padding[axis] < step->kernel[axis])
                    return TBN_MISFIT;
                found = pooled(step, axis, size);
            } else if (step->kind == TBN_STEP_PLANES)
                found = size;
            else if (step->kind == TBN_STEP_LINEAR && features(network, images, step->input) != step->layer->inputs)
                return TBN_MISFIT;
            *(axis ? &to->width : &to->height) = found;
        }
        if (step->kind == TBN_STEP_CONV)
            from->slack = tbn_max(from->slack, tbn_slack(conv_of(step), network->values[step->input].channels, 1));
        if (step->added != TBN_NONE &&
            (images[step->added].height != to->height || images[step->added].width != to->width))
            return TBN_MISFIT;
    }
    return TBN_OK;
}

/* Bytes of a value, and where its floats begin among them. */
static void measure_value(const struct tbn_value *value, size_t samples, struct image *image) {
    const size_t width = image->width + 2 * value->border, height = image->height + 2 * value->border;
    image->bytes.pixel = value->channels;
    image->bytes.row = width * value->channels;
    image->bytes.image = height * image->bytes.row;
    image->at_floats =
        value->scale == 0.0f ? 0 : tbn_round_up(samples * image->bytes.image + image->slack, TBN_ALIGN);
    const size_t floats = value->floats ? samples * image->height * image->width * value->channels * sizeof(float) : 0;
    image->size = tbn_round_up(image->at_floats + floats, TBN_ALIGN);
}

/* Finds places for all values that steps write, from `start` on: the first that no value takes which is read later. Returns
   the size of the whole. */
static size_t place_values(const struct tbn_network *network, size_t samples, struct image *images, size_t start) {
    size_t end = start;
    for (size_t i = 0; i < network->step_count; i++) {
        const size_t output = network->steps[i].output;
        measure_value(&network->values[output], samples, &images[output]);
        size_t at = start;
        for (int moved = 1; moved;) {
            moved = 0;
            for (size_t j = 0; j < i; j++) { /* each output is written once */
                const size_t other = network->steps[j].output;
                const struct image *taken = &images[other];
                if (network->values[other].last < i || taken->size == 0)
                    continue;
                if (at < taken->at + taken->size && taken->at < at + images[output].size) {
                    at = taken->at + taken->size;
                    moved = 1;
                }
            }
        }
        images[output].at = at;
        end = tbn_max(end, at + images[output].size);
    }
    return end;
}

/* Writes zeros around the images of a value. */
static void clear_borders(const struct tbn_value *value, const struct image *image, size_t samples) {
    const size_t side = value->border * image->bytes.pixel, whole = value->border * image->bytes.row;
    if (side == 0)
        return;
    for (size_t sample = 0; sample < samples; sample++) {
        uint8_t *first = tbn_pixel(&image->bytes, sample, 0, 0) - side;
        memset(first - whole, TBN_DOT_ZERO, whole);
        for (size_t y = 0; y < image->height; y++, first += image->bytes.row) {
            memset(first, TBN_DOT_ZERO, side);
            memset(first + image->bytes.row - side, TBN_DOT_ZERO, side);
        }
        memset(first, TBN_DOT_ZERO, whole);
    }
}

static int run_conv(const struct run *run, const struct tbn_step *step) {
    const struct tbn_bound *layer = step->layer;
    const struct image *from = &run->images[step->input], *to = &run->images[step->output];
    struct tbn_conv_input input = {.samples = run->samples, .height = from->height, .width = from->width,
                                   .scales = run->scales};
    if (step->input == 0)
        input.x = run->x;
    else
        input.bytes = from->bytes;
    struct tbn_store store = {.rounded = step->rounded, .relu = step->relu, .floats = to->floats, .bytes = to->bytes,
                              .scale = run->network->values[step->output].scale};
    if (step->added != TBN_NONE && step->added_scale != 0.0f) {
        store.added_bytes = run->images[step->added].bytes;
        store.added_scale = step->added_scale;
    } else if (step->added != TBN_NONE)
        store.added = run->images[step->added].floats;
    const struct tbn_form *form = &layer->forms[step->input != 0 || run->last];
    return tbn_conv_store(form->layer, &input, &store, layer->alpha, layer->bias, layer->scale, run->threads);
}

static int run_linear(const struct run *run, const struct tbn_step *step) {
    const struct tbn_bound *layer = step->layer;
    const struct tbn_form *form = &layer->forms[run->samples >= TBN_MIN_BATCH];
    const float *x = step->input == 0 ? run->x : run->images[step->input].floats;
    return form->linear(form->layer, x, run->images[step->output].floats, run->samples, layer->alpha, layer->bias,
                        layer->scale, run->threads);
}

/* The values of a window that lie inside the image: along one axis. */
static void window(const struct tbn_step *step, int axis, size_t place, size_t size, size_t *first, size_t *last) {
    const size_t start = place * step->stride[axis], before = step->padding[axis];
    *first = start < before ? before - start : 0;
    *last = tbn_min(step->kernel[axis], size + before - start);
}

/* value * factor + offset for each channel, and the larger of that and 0. */
static void finish_pooled(const struct tbn_step *step, size_t channels, float *values) {
    for (size_t i = 0; step->factors && i < channels; i++)
        values[i] = values[i] * step->factors[i] + step->offsets[i];
    for (size_t i = 0; step->relu && i < channels; i++)
        values[i] = values[i] < 0.0f ? 0.0f : values[i];
}

/* Rows of the results of a pooling: what its threads share. */
struct pooling {
    const struct run *run;
    const struct tbn_step *step;
    tbn_counter next;
};

/* One row of results; `taps`, `pooled_floats`: room for the values of a window, and for one result. */
static void pool_row(const struct pooling *pooling, size_t unit, const void **taps, float *pooled_floats) {
    const struct run *run = pooling->run;
    const struct tbn_step *step = pooling->step;
    const struct image *from = &run->images[step->input], *to = &run->images[step->output];
    const struct tbn_value *value = &run->network->values[step->output];
    const struct tbn_dots *dots = run->network->dots;
    const size_t channels = value->channels, plane = from->height * from->width;
    const size_t sample = unit / to->height, y = unit % to->height;
    size_t first_y, last_y;
    window(step, 0, y, from->height, &first_y, &last_y);
    for (size_t x = 0; x < to->width; x++) {
        size_t count = 0, first_x, last_x;
        window(step, 1, x, from->width, &first_x, &last_x);
        for (size_t i = first_y; i < last_y; i++)
            for (size_t j = first_x; j < last_x; j++) {
                const size_t row = y * step->stride[0] + i - step->padding[0];
                const size_t column = x * step->stride[1] + j - step->padding[1];
                if (step->on_bytes)
                    taps[count++] = tbn_pixel(&from->bytes, sample, row, column);
                else
                    taps[count++] = from->floats + (sample * plane + row * from->width + column) * channels;
            }
        uint8_t *bytes = to->bytes.first ? tbn_pixel(&to->bytes, sample, y, x) : NULL;
        if (step->on_bytes) {
            dots->max_bytes((const uint8_t *const *)taps, count, channels, bytes);
            continue;
        }
        float *floats = to->floats ? to->floats + (unit * to->width + x) * channels : pooled_floats;
        dots->max_floats((const float *const *)taps, count, channels, floats);
        finish_pooled(step, channels, floats);
        if (bytes)
            dots->bytes(floats, channels, TBN_INT8, 1.0f / value->scale, bytes, 0);
    }
}

static size_t pooling_rows(const struct pooling *pooling) {
    return pooling->run->samples * pooling->run->images[pooling->step->output].height;
}

static void pool_rows(void *argument) {
    struct pooling *pooling = argument;
    const struct tbn_step *step = pooling->step;
    const size_t most = step->kernel[0] * step->kernel[1], units = pooling_rows(pooling);
    const size_t channels = pooling->run->network->values[step->output].channels;
    const void **taps = malloc(most * sizeof *taps + channels * sizeof(float));
    if (!taps)
        return; /* the rows are left to the other threads, or remain */
    for (size_t unit; (unit = tbn_take_number(&pooling->next)) < units;)
        pool_row(pooling, unit, taps, (float *)(void *)(taps + most));
    free(taps);
}

static int run_max_pool(const struct run *run, const struct tbn_step *step) {
    struct pooling pooling = {.run = run, .step = step};
    const size_t rows = pooling_rows(&pooling);
    tbn_parallel(tbn_min(run->threads, rows), pool_rows, &pooling);
    return tbn_taken(&pooling.next) < rows ? TBN_OUT_OF_MEMORY : TBN_OK;
}

/* Means over all positions: of floats in double, of bytes from the sums of their integers. */
static int run_mean(const struct run *run, const struct tbn_step *step) {
    const struct image *from = &run->images[step->input];
    const struct tbn_value *value = &run->network->values[step->input];
    const size_t channels = value->channels, plane = from->height * from->width;
    double *sums = malloc(channels * sizeof *sums);
    if (!sums)
        return TBN_OUT_OF_MEMORY;
    for (size_t sample = 0; sample < run->samples; sample++) {
        float *out = run->images[step->output].floats + sample * channels;
        memset(sums, 0, channels * sizeof *sums);
        for (size_t position = 0; position < plane; position++) {
            const uint8_t *bytes =
                step->on_bytes ? tbn_pixel(&from->bytes, sample, position / from->width, position % from->width) : NULL;
            const float *floats = step->on_bytes ? NULL : from->floats + (sample * plane + position) * channels;
            if (bytes)
                for (size_t i = 0; i < channels; i++)
                    sums[i] += (double)(bytes[i] - TBN_DOT_ZERO);
            else
                for (size_t i = 0; i < channels; i++)
                    sums[i] += (double)floats[i];
        }
        const double scale = step->on_bytes ? (double)value->scale : 1.0;
        for (size_t i = 0; i < channels; i++)
            out[i] = (float)(sums[i] * scale / (double)plane);
    }
    free(sums);
    return TBN_OK;
}

/* Images as floats in planes, for whoever reads them as a vector, or outside; a result in the format of the input. */
static int run_planes(const struct run *run, const struct tbn_step *step) {
    const struct image *from = &run->images[step->input];
    const struct tbn_value *value = &run->network->values[step->input];
    const size_t channels = value->channels, plane = from->height * from->width;
    const int last = run->last && run->network->out_dims == 4;
    const size_t apart = last ? 1 : plane, step_on = last ? channels : 1; /* between channels, and between positions */
    for (size_t sample = 0; sample < run->samples; sample++) {
        float *out = run->images[step->output].floats + sample * channels * plane;
        for (size_t position = 0; position < plane; position++)
            for (size_t i = 0; i < channels; i++)
                out[i * apart + position * step_on] =
                    step->on_bytes ? (float)(tbn_pixel(&from->bytes, sample, position / from->width,
                                                       position % from->width)[i] - TBN_DOT_ZERO) * value->scale
                                   : from->floats[(sample * plane + position) * channels + i];
    }
    return TBN_OK;
}

static int run_steps(const struct run *run) {
    int (*const functions[])(const struct run *, const struct tbn_step *) = {
        [TBN_STEP_CONV] = run_conv, [TBN_STEP_LINEAR] = run_linear, [TBN_STEP_MAX_POOL] = run_max_pool,
        [TBN_STEP_MEAN] = run_mean, [TBN_STEP_PLANES] = run_planes,
    };
    const struct tbn_network *network = run->network;
    int status = TBN_OK;
    for (size_t i = 0; i < network->step_count && status == TBN_OK; i++) {
        const struct tbn_step *step = &network->steps[i];
        if (network->values[step->output].scale != 0.0f)
            clear_borders(&network->values[step->output], &run->images[step->output], run->samples);
        status = functions[step->kind](run, step);
    }
    return status;
}

/* Where the values are: the last one is the result, and is written where it is wanted. */
static void point_to_values(const struct run *run, char *memory) {
    const struct tbn_network *network = run->network;
    for (size_t i = 0; i < network->step_count; i++) {
        const size_t output = network->steps[i].output;
        const struct tbn_value *value = &network->values[output];
        struct image *image = &run->images[output];
        const size_t border = value->border * (image->bytes.row + image->bytes.pixel);
        if (value->scale != 0.0f)
            image->bytes.first = (uint8_t *)memory + image->at + border;
        if (value->floats)
            image->floats = (float *)(void *)(memory + image->at + image->at_floats);
    }
    run->images[network->steps[network->step_count - 1].output].floats = run->out;
}

int tbn_network_sizes(const struct tbn_network *network, size_t height, size_t width, size_t *sizes) {
    struct image *images = calloc(network->value_count, sizeof *images);
    if (!images)
        return TBN_OUT_OF_MEMORY;
    images[0].height = height;
    images[0].width = width;
    const int status = find_sizes(network, images);
    const struct image *result = &images[network->steps[network->step_count - 1].output];
    sizes[0] = result->height;
    sizes[1] = result->width;
    free(images);
    return status;
}

int tbn_network(const struct tbn_network *network, const float *x, int last, float *out, size_t samples, size_t height,
                size_t width, size_t threads) {
    if (samples == 0)
        return TBN_OK;
    struct run run = {.network = network, .x = x, .last = last, .out = out, .samples = samples, .threads = threads};
    run.images = calloc(network->value_count, sizeof *run.images);
    if (!run.images)
        return TBN_OUT_OF_MEMORY;
    run.images[0].height = height;
    run.images[0].width = width;
    int status = find_sizes(network, run.images);
    char *memory = NULL;
    if (status == TBN_OK) {
        const size_t start = tbn_round_up(samples * sizeof(float), TBN_ALIGN);
        memory = tbn_allocate(place_values(network, samples, run.images, start));
        status = memory ? TBN_OK : TBN_OUT_OF_MEMORY;
    }
    if (status == TBN_OK) {
        run.scales = (float *)(void *)memory;
        memset(run.scales, 0, samples * sizeof(float));
        point_to_values(&run, memory);
        status = run_steps(&run);
    }
    const struct tbn_step *end = &network->steps[network->step_count - 1];
    const size_t count = features(network, run.images, end->output);
    for (size_t sample = 0; status == TBN_OK && sample < samples; sample++) /* bytes hold no NaN */
        for (size_t i = 0; isnan(run.scales[sample]) && i < count; i++)
            out[sample * count + i] = NAN;
    tbn_free(memory);
    free(run.images);
    return status;
}
