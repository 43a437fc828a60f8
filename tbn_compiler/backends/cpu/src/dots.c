/*
 * Linear layers and convolutions as products of bytes (struct tbn_dots).
 *
 * Inputs are made bytes once. A convolution's stand in images with their padding, [row][column][channel], so that what
 * a position meets lies in a few runs of neighbouring bytes, at the same distances from the position: nothing is
 * unrolled. Images of few channels may be folded: all rows that an output row meets stand in one, the bytes of a column
 * one behind the other, for which the kernel has a height of 1. A unit of work is a band of output rows of one sample and
 * one group, a set of blocks of results (shared.c), or a few tokens.
 *
 * Each limb of floats has images of its own, and its tiles stand behind those of the limb before: products do not know of
 * limbs, and weights are made bytes once for all. Samples that limbs do not stand for are looked up at the end. Levels that
 * multiply floats as they are have images of floats, and what is said of bytes goes for these.
 */
#include <math.h>
#include <string.h>

#include "dots.h"
#include "pool.h"

/* Sums of a unit: what the second-level cache holds along with the rest. */
enum { SUMS_BUDGET = 192 * 1024, TOKEN_TILES = 8 };

/* Buffers of one thread. */
struct buffers {
    const uint8_t **tiles; /* as struct tbn_dot has them, [limb] */
    int8_t *weights; /* room, as struct tbn_dot has it */
    int32_t *z;      /* [column group][limb][tile][input][row]; floats once limbs are put together, or of floats as they are */
};

/* Sums of one column group in `tiles` tiles. */
static size_t z_size(const struct call *call, size_t tiles) {
    return tiles * TBN_DOT_INPUTS * call->blocks * TBN_DOT_ROWS;
}

/* Pointers of `tiles` tiles. */
static size_t pointers(const struct call *call, size_t tiles) {
    return call->dots->gathers ? tiles * TBN_DOT_INPUTS : tiles;
}

static size_t take_buffers(const struct call *call, char *base, struct buffers *buffers) {
    struct tbn_scratch scratch = {base, 0};
    buffers->tiles = tbn_take(&scratch, call->limbs * pointers(call, call->tiles) * sizeof *buffers->tiles);
    buffers->weights = tbn_take(&scratch, call->dots->room(call->steps, call->blocks));
    buffers->z = tbn_take(&scratch, call->mixes * z_size(call, call->limbs * call->tiles) * sizeof(int32_t));
    return scratch.used;
}

/* Fills tiles that are gathered up, behind `count` inputs: with the last one, then with none. */
static void fill_up(const uint8_t **tiles, size_t count) {
    for (; count % TBN_DOT_GATHERED; count++)
        tiles[count] = tiles[count - 1];
    for (; count % TBN_DOT_INPUTS; count++)
        tiles[count] = NULL;
}

/* `apart` bytes further on, if there is anything. */
static const uint8_t *moved(const uint8_t *input, size_t apart) {
    return input ? input + apart : NULL;
}

/* Where the tiles of the other limbs begin, behind `tiles` tiles of the first one. */
static void find_limbs(const struct call *call, const struct buffers *buffers, size_t tiles) {
    const size_t count = pointers(call, tiles);
    for (size_t i = count; i < call->limbs * count; i++)
        buffers->tiles[i] = moved(buffers->tiles[i - count], call->limb_bytes);
}

/*
 * Sums of `tiles` tiles of inputs of all column groups of a group, mixed, and put together where they are of limbs.
 * Column groups lie `apart` bytes apart; `corrections` are those of the group.
 */
static void multiply(const struct call *call, const struct buffers *buffers, const void *index,
                     const int32_t *corrections, size_t group, size_t tiles, size_t stride, size_t apart) {
    const size_t index_size = call->blocks * call->steps * TBN_DOT_BYTES / 4;
    const size_t count = call->limbs * tiles, z_mix = z_size(call, count);
    for (size_t mix = 0; mix < call->mixes; mix++) {
        const struct tbn_dot job = {
            .tiles = buffers->tiles,
            .count = count,
            .stride = stride,
            .places = call->places,
            .steps = call->steps,
            .index = (const uint64_t *)index + (group * call->mixes + mix) * index_size,
            .blocks = call->blocks,
            .weights = buffers->weights,
            .z = buffers->z + mix * z_mix,
        };
        /* The last tile of a limb may not be filled, but all of it is mixed. */
        for (size_t limb = 1; call->mixes > 1 && limb <= call->limbs; limb++)
            memset(job.z + limb * z_size(call, tiles) - z_size(call, 1), 0, z_size(call, 1) * sizeof(int32_t));
        (tbn_takes_floats(call) ? call->dots->multiply_floats : call->dots->multiply)(&job);
        for (size_t i = 0; mix + 1 < call->mixes && i < pointers(call, count); i++)
            buffers->tiles[i] = moved(buffers->tiles[i], apart);
    }
    tbn_mix(call, buffers->z, z_mix);
    for (size_t mix = 0; call->limbs > 1 && mix < call->mixes; mix++)
        call->dots->combine(buffers->z + mix * z_mix, call->blocks * TBN_DOT_ROWS, z_size(call, tiles),
                            corrections + mix * call->rows, call->rows, tiles * TBN_DOT_INPUTS);
}

/* Tiles of `rows` output rows: where they do not gather, each row has its own. */
static size_t band_tiles(const struct call *call, size_t rows) {
    return call->dots->gathers ? tbn_ceil_divide(rows * call->out_width, TBN_DOT_INPUTS)
                               : rows * tbn_ceil_divide(call->out_width, TBN_DOT_INPUTS);
}

/* Where the tiles of output rows from `first_row` on lie in an image. */
static void find_tiles(const struct call *call, const uint8_t *image, size_t first_row, size_t rows, size_t stride,
                       const uint8_t **tiles) {
    const size_t step = call->dots->gathers ? 1 : TBN_DOT_INPUTS;
    size_t count = 0;
    for (size_t y = first_row; y < first_row + rows; y++) {
        const uint8_t *row = image + y * call->row_step * call->row_bytes;
        for (size_t x = 0; x < call->out_width; x += step)
            tiles[count++] = row + x * stride;
    }
    if (call->dots->gathers)
        fill_up(tiles, count);
}

/* A factor that makes int8 values, or 0 for the scale 0. */
static float factor_of(float scale) {
    return scale == 0.0f ? 0.0f : 1.0f / scale;
}

/* Results of `count` rows and of `inputs` neighbouring positions, for a network. Bytes end with a row of their image. */
static void store_positions(const struct call *call, const struct tbn_dot_finish *finish, const int32_t *z, size_t z_input,
                            size_t count, size_t inputs, size_t sample, size_t position, size_t channel) {
    const struct tbn_store *store = call->store;
    const size_t channels = call->groups * call->conv->channels_out;
    const size_t plane = call->out_height * call->out_width;
    while (inputs) {
        const size_t y = position / call->out_width, x = position % call->out_width;
        const size_t some = tbn_min(inputs, call->out_width - x), at = (sample * plane + position) * channels + channel;
        struct tbn_dot_store job = {
            .rounded = store->rounded, .rounded_factor = factor_of(store->rounded), .added_scale = store->added_scale,
            .relu = store->relu, .factor = factor_of(store->scale),
        };
        if (store->added) {
            job.added = store->added + at;
            job.added_step = channels;
        } else if (store->added_bytes.first) {
            job.added_bytes = tbn_pixel(&store->added_bytes, sample, y, x) + channel;
            job.added_step = store->added_bytes.pixel;
        }
        if (store->floats) {
            job.floats = store->floats + at;
            job.floats_step = channels;
        }
        if (store->bytes.first) {
            job.bytes = tbn_pixel(&store->bytes, sample, y, x) + channel;
            job.bytes_step = store->bytes.pixel;
        }
        call->dots->store_inputs(finish, &job, z, z_input, count, some);
        inputs -= some;
        position += some;
        z += some * z_input;
    }
}

void tbn_finish_positions(const struct call *call, const int32_t *z, size_t z_input, size_t z_mix, size_t sample, size_t group,
                          size_t position, size_t inputs) {
    const struct tbn_conv *layer = call->conv;
    const int32_t *corrections = layer->corrections + group * call->mixes * call->rows;
    const size_t channels = call->groups * layer->channels_out, plane = call->out_height * call->out_width;
    /* Channels that are finished at once: those of a copy, or of all copies where sums change places for planes. */
    const int planes = !call->store && !layer->channels_last;
    const size_t some = planes && call->mixes == 1 ? layer->channels_out : call->rows;
    for (size_t j = 0; j < layer->channels_out; j += some) {
        const size_t channel = group * layer->channels_out + j, mix = call->mixes > 1 ? j / call->rows : 0;
        const size_t count = tbn_min(some, layer->channels_out - j);
        const int32_t *sums = z + mix * z_mix;
        const struct tbn_dot_finish finish = {
            .correction = call->activation == TBN_FLOAT ? NULL : corrections + mix * call->rows,
            .alpha = call->alphas + channel,
            .bias = call->bias ? call->bias + channel : NULL,
            .scales = call->scales + sample,
            .relu = layer->relu,
        };
        if (call->store)
            store_positions(call, &finish, sums, z_input, count, inputs, sample, position, channel);
        else if (layer->channels_last)
            call->dots->finish_inputs(&finish, sums, z_input, count, inputs,
                                      call->out + (sample * plane + position) * channels + channel, channels);
        else
            call->dots->finish_rows(&finish, sums, z_input, call->rows, count, inputs,
                                    call->out + (sample * channels + channel) * plane + position, plane);
    }
}

/* Output rows [first_row, first_row + rows) of one sample and group. */
static void conv_band(const struct call *call, const struct buffers *buffers, size_t sample, size_t group,
                      size_t first_row, size_t rows) {
    const struct tbn_conv *layer = call->conv;
    const int gathers = call->dots->gathers;
    const size_t tiles = band_tiles(call, rows), row_tiles = tiles / rows;
    const size_t stride = layer->stride[1] * call->pixel_bytes, z_row = call->blocks * TBN_DOT_ROWS;
    const uint8_t *image = call->bytes + (sample * call->groups + group) * call->mixes * call->image_bytes;
    find_tiles(call, image, first_row, rows, stride, buffers->tiles);
    const int32_t *corrections = layer->corrections + group * call->mixes * call->rows;
    find_limbs(call, buffers, tiles);
    multiply(call, buffers, layer->index, corrections, group, tiles, stride, call->image_bytes);
    for (size_t tile = 0; tile < tiles; tile++) {
        const size_t x = (gathers ? tile : tile % row_tiles) * TBN_DOT_INPUTS; /* from the band, or its row, on */
        const size_t first = (first_row + (gathers ? 0 : tile / row_tiles)) * call->out_width;
        const size_t inputs = tbn_min(TBN_DOT_INPUTS, (gathers ? rows : 1) * call->out_width - x);
        tbn_finish_positions(call, buffers->z + tile * TBN_DOT_INPUTS * z_row, z_row, z_size(call, call->limbs * tiles), sample,
                             group, first + x, inputs);
    }
}

/* Tokens from `first` on, `tokens` of them. */
static void linear_tokens(const struct call *call, const struct buffers *buffers, size_t first, size_t tokens) {
    const struct tbn_linear *layer = call->linear;
    const size_t tiles = tbn_ceil_divide(tokens, TBN_DOT_INPUTS), z_row = call->blocks * TBN_DOT_ROWS;
    if (call->dots->gathers) {
        for (size_t token = 0; token < tokens; token++)
            buffers->tiles[token] = call->bytes + (first + token) * call->pixel_bytes;
        fill_up(buffers->tiles, tokens);
    } else
        for (size_t tile = 0; tile < tiles; tile++)
            buffers->tiles[tile] = call->bytes + (first + tile * TBN_DOT_INPUTS) * call->pixel_bytes;
    multiply(call, buffers, layer->index, NULL, 0, tiles, call->pixel_bytes, call->image_bytes);
    const size_t outputs = layer->copies * layer->rows;
    for (size_t tile = 0; tile < tiles; tile++)
        for (size_t copy = 0; copy < layer->copies; copy++) {
            const size_t mix = call->mixes > 1 ? copy : 0, output = copy * layer->rows, i = tile * TBN_DOT_INPUTS;
            const struct tbn_dot_finish finish = {
                .correction = layer->corrections + mix * layer->rows,
                .alpha = call->alphas + output,
                .bias = call->bias ? call->bias + output : NULL,
                .scales = call->scales + first + i,
                .scale_step = 1,
                .relu = layer->relu,
            };
            const int32_t *z = buffers->z + mix * z_size(call, tiles) + i * z_row;
            call->dots->finish_inputs(&finish, z, z_row, layer->rows, tbn_min(TBN_DOT_INPUTS, tokens - i),
                                      call->out + (first + i) * outputs + output, outputs);
        }
}

/* Units of blocks whose pixels share their tables. */
static void run_shared(struct call *call) {
    char *memory = tbn_allocate(tbn_sharing_room(call));
    if (!memory)
        return; /* the units are left to the other threads, or remain */
    call->dots->begin();
    for (size_t unit; (unit = tbn_take_number(&call->next)) < call->units;)
        tbn_share(call, memory, unit);
    call->dots->end();
    tbn_free(memory);
}

static void run(void *argument) {
    struct call *call = argument;
    struct buffers buffers;
    if (call->sharing) {
        run_shared(call);
        return;
    }
    char *memory = tbn_allocate(tbn_max(take_buffers(call, NULL, &buffers), TBN_ALIGN));
    if (!memory)
        return; /* the units are left to the other threads, or remain */
    take_buffers(call, memory, &buffers);
    call->dots->begin();
    for (;;) {
        const size_t unit = tbn_take_number(&call->next);
        if (unit >= call->units)
            break;
        if (call->linear) {
            const size_t first = unit * call->tiles * TBN_DOT_INPUTS;
            linear_tokens(call, &buffers, first, tbn_min(call->tiles * TBN_DOT_INPUTS, call->samples - first));
            continue;
        }
        const size_t band = unit % call->bands, group = unit / call->bands % call->groups;
        const size_t first_row = band * call->band_rows;
        conv_band(call, &buffers, unit / call->bands / call->groups, group, first_row,
                  tbn_min(call->band_rows, call->out_height - first_row));
    }
    call->dots->end();
    tbn_free(memory);
}

/* The steps of a run of so many values, a multiple of 4, `at` bytes from an input; written unless `places` is NULL. */
static size_t find_steps(const struct call *call, size_t values, size_t at, struct tbn_dot_step *places) {
    const size_t steps = tbn_ceil_divide(values, TBN_DOT_BYTES);
    for (size_t i = 0; places && i < steps; i++) {
        places[i].offset = at + i * TBN_DOT_BYTES * call->value_bytes;
        places[i].fours = tbn_min(TBN_DOT_BYTES, values - i * TBN_DOT_BYTES) / 4;
    }
    return steps;
}

/* The steps of a convolution: a run for each row of the kernel, or for each place in it. */
static size_t conv_steps(const struct call *call, struct tbn_dot_step *places) {
    const struct tbn_conv *layer = call->conv;
    const size_t runs = layer->dilation[1] == 1 ? 1 : layer->kernel[1]; /* of a row */
    const size_t values = layer->kernel[1] / runs * call->pixel_bytes / call->value_bytes;
    size_t steps = 0;
    for (size_t y = 0; y < (layer->folded ? 1 : layer->kernel[0]); y++)
        for (size_t x = 0; x < runs; x++)
            steps += find_steps(call, values,
                                y * layer->dilation[0] * call->row_bytes + x * layer->dilation[1] * call->pixel_bytes,
                                places ? places + steps : NULL);
    return steps;
}

/* [rows][columns] -> [columns][rows] */
static void transpose(const float *x, size_t rows, size_t columns, float *out) {
    for (size_t row = 0; row < rows; row++)
        for (size_t column = 0; column < columns; column++)
            out[column * rows + row] = x[row * columns + column];
}

/* Looks a sample up: tables are made of planes. */
static int look_up_sample(const struct call *call, size_t sample, size_t threads) {
    const struct tbn_conv *layer = call->conv;
    const size_t plane = call->height * call->width, channels = call->groups * call->mixes * layer->channels;
    const size_t out_plane = call->out_height * call->out_width, out_channels = call->groups * layer->channels_out;
    const float *x = call->x + sample * channels * plane;
    float *out = call->out + sample * out_channels * out_plane;
    if (!layer->channels_last)
        return tbn_conv(layer->lookups, x, out, 1, call->height, call->width, call->alpha, call->bias, NULL,
                        threads);
    float *planes = malloc((channels * plane + out_channels * out_plane) * sizeof(float));
    if (!planes)
        return TBN_OUT_OF_MEMORY;
    float *results = planes + channels * plane;
    transpose(x, plane, channels, planes);
    const int status =
        tbn_conv(layer->lookups, planes, results, 1, call->height, call->width, call->alpha, call->bias, NULL, threads);
    transpose(results, out_channels, out_plane, out);
    free(planes);
    return status;
}

/* Looks up what limbs or sums of floats do not stand for, each sample on its own, so that no other one changes its result. */
static int look_up(const struct call *call, size_t threads) {
    int status = TBN_OK;
    for (size_t sample = 0; call->activation == TBN_FLOAT && status == TBN_OK && sample < call->samples; sample++)
        if (isnan(call->scales[sample]))
            status = look_up_sample(call, sample, threads);
    return status;
}

/* Allocates what all threads share, makes bytes of the inputs, and runs the units. */
static int compute(struct call *call, size_t threads, size_t outputs, size_t alpha_rows, size_t images, size_t slack,
                   size_t whole) {
    const int folded = call->conv && call->conv->folded;
    const struct tbn_bytes *bytes = call->input ? &call->input->bytes : NULL;
    const int given = bytes && bytes->first; /* the images are there, if only to be folded */
    struct tbn_scratch parts = {NULL, 0};
    call->limb_bytes = tbn_round_up(images * call->image_bytes + slack, TBN_ALIGN);
    call->whole_bytes = whole;
    call->unfolded_bytes = call->groups * call->mixes * call->unfolded_image;
    tbn_take(&parts, given && !folded ? 0 : call->limbs * call->limb_bytes);
    const size_t at_scales = parts.used;
    tbn_take(&parts, call->samples * sizeof(float));
    const size_t at_places = parts.used;
    tbn_take(&parts, call->steps * sizeof(struct tbn_dot_step));
    const size_t at_alphas = parts.used;
    tbn_take(&parts, outputs * sizeof(float));
    const size_t at_whole = parts.used;
    tbn_take(&parts, call->limbs * whole);
    const size_t at_unfolded = parts.used;
    tbn_take(&parts, folded && !given ? call->limbs * call->unfolded_bytes : 0);
    char *memory = tbn_allocate(tbn_max(parts.used, TBN_ALIGN));
    if (!memory)
        return TBN_OUT_OF_MEMORY;
    float *alphas = (float *)(void *)(memory + at_alphas);
    for (size_t i = 0; i < outputs; i++)
        alphas[i] = call->alpha[i / alpha_rows];
    call->bytes = (uint8_t *)memory;
    call->scales = (float *)(void *)(memory + at_scales);
    call->places = (struct tbn_dot_step *)(void *)(memory + at_places);
    call->alphas = alphas;
    call->whole = (uint8_t *)memory + at_whole;
    call->unfolded = folded ? (uint8_t *)memory + at_unfolded : NULL;
    for (size_t sample = 0; given && sample < call->samples; sample++) {
        uint8_t *image = tbn_pixel(bytes, sample, 0, 0) - call->conv->padding[0] * bytes->row -
                               call->conv->padding[1] * bytes->pixel;
        call->scales[sample] = *call->scale;
        if (folded)
            tbn_fold_image(call, image, call->bytes + sample * call->image_bytes);
        else if (sample == 0)
            call->bytes = image;
    }
    for (size_t limb = 0; !given && limb < call->limbs; limb++) {
        const int zero = limb || tbn_takes_floats(call) ? 0 : TBN_DOT_ZERO;
        uint8_t *of_limb = call->bytes + limb * call->limb_bytes;
        if (folded) {
            memset(call->unfolded + limb * call->unfolded_bytes, zero, call->unfolded_bytes);
            memset(of_limb + images * call->image_bytes, zero, slack);
        } else
            memset(of_limb, zero, images * call->image_bytes + slack);
    }
    if (call->conv)
        conv_steps(call, call->places);
    else
        find_steps(call, call->pixel_bytes, 0, call->places);
    for (size_t sample = 0; !given && sample < call->samples; sample++) {
        if (call->conv)
            tbn_make_images(call, sample);
        else
            tbn_fill_token(call, sample);
    }
    if (call->input && !given)
        memcpy(call->input->scales, call->scales, call->samples * sizeof(float));
    tbn_parallel(tbn_min(threads, call->units), run, call);
    const int status = tbn_taken(&call->next) < call->units ? TBN_OUT_OF_MEMORY : look_up(call, threads);
    tbn_free(memory);
    return status;
}

int tbn_linear_dots(const struct tbn_linear *layer, const float *x, float *out, size_t tokens, const float *alpha,
                    const float *bias, const float *scale, size_t threads) {
    const size_t columns = layer->inputs / layer->mixes, outputs = layer->copies * layer->rows;
    struct call call = {
        .dots = layer->kernels->dots, .kernels = layer->kernels, .linear = layer, .x = x, .out = out, .alpha = alpha,
        .bias = bias, .scale = scale,
        .activation = (enum tbn_activation)layer->activation, .limbs = 1, .value_bytes = 1,
        .rows = layer->rows, .blocks = tbn_ceil_divide(layer->rows, TBN_DOT_ROWS), .groups = 1, .mixes = layer->mixes,
        .samples = tokens, .pixel_bytes = tbn_round_up(columns, TBN_DOT_BYTES),
    };
    if (tokens == 0)
        return TBN_OK;
    call.steps = call.pixel_bytes / TBN_DOT_BYTES;
    const size_t tiles = tbn_ceil_divide(tokens, TBN_DOT_INPUTS);
    call.units = tbn_max(tbn_ceil_divide(tiles, TOKEN_TILES), tbn_min(tiles, threads));
    call.tiles = tbn_ceil_divide(tiles, call.units);
    call.units = tbn_ceil_divide(tiles, call.tiles);
    call.image_bytes = tbn_round_up(tokens, TBN_DOT_INPUTS) * call.pixel_bytes;
    const size_t alpha_rows = layer->alpha_row_stride ? 1 : layer->alpha_copy_stride ? layer->rows : outputs;
    return compute(&call, threads, outputs, alpha_rows, call.mixes, 0, layer->inputs);
}

/* A convolution, whose results go to `out` or, in a network, where `store` says. */
static int convolve(const struct tbn_conv *layer, const float *x, float *out, const struct tbn_conv_input *input,
                    const struct tbn_store *store, size_t samples, size_t height, size_t width, const float *alpha,
                    const float *bias, const float *scale, size_t threads) {
    const int floats = layer->activation == TBN_FLOAT, as_they_are = floats && layer->kernels->dots->multiply_floats;
    struct call call = {
        .dots = layer->kernels->dots, .kernels = layer->kernels, .conv = layer, .x = x, .out = out, .store = store,
        .input = input, .alpha = alpha, .bias = bias, .scale = scale,
        .activation = (enum tbn_activation)layer->activation, .limbs = floats && !as_they_are ? TBN_LIMBS : 1,
        .value_bytes = as_they_are ? sizeof(float) : 1,
        .rows = layer->rows, .blocks = tbn_ceil_divide(layer->rows, TBN_DOT_ROWS), .groups = layer->groups,
        .mixes = layer->mixes, .samples = samples, .height = height, .width = width,
        .out_height = tbn_output_size(layer, 0, height), .out_width = tbn_output_size(layer, 1, width),
        .unfolded_pixel = tbn_round_up(layer->channels, 4) * (as_they_are ? sizeof(float) : 1),
        .row_step = layer->folded ? 1 : layer->stride[0],
    };
    if (samples == 0)
        return TBN_OK;
    const size_t columns = width + 2 * layer->padding[1];
    call.unfolded_row = columns * call.unfolded_pixel;
    call.unfolded_image = (height + 2 * layer->padding[0]) * call.unfolded_row;
    call.pixel_bytes = call.unfolded_pixel * (layer->folded ? layer->kernel[0] : 1);
    call.row_bytes = columns * call.pixel_bytes;
    call.image_bytes = layer->folded ? call.out_height * call.row_bytes : call.unfolded_image;
    if (input && input->bytes.first) { /* its borders may be wider than this layer's */
        call.unfolded_row = input->bytes.row;
        if (!layer->folded) {
            call.row_bytes = input->bytes.row;
            call.image_bytes = input->bytes.image;
        }
    }
    call.steps = conv_steps(&call, NULL);
    const size_t row_sums = call.mixes * z_size(&call, call.limbs * band_tiles(&call, 1)) * sizeof(int32_t);
    call.band_rows = tbn_min(call.out_height, tbn_max(1, SUMS_BUDGET / row_sums));
    const size_t bands = tbn_ceil_divide(threads, samples * call.groups); /* enough for every thread */
    call.band_rows = tbn_min(call.band_rows, tbn_ceil_divide(call.out_height, bands));
    call.bands = tbn_ceil_divide(call.out_height, call.band_rows);
    call.tiles = band_tiles(&call, call.band_rows);
    call.units = samples * call.groups * call.bands;
    tbn_plan_sharing(&call, threads);
    const size_t slack = tbn_slack(layer, call.pixel_bytes, call.value_bytes);
    return compute(&call, threads, call.groups * layer->channels_out, layer->alpha_rows,
                   samples * call.groups * call.mixes, slack,
                   layer->channels_last ? width * call.groups * layer->channels * call.mixes * call.value_bytes : 0);
}

int tbn_conv_dots(const struct tbn_conv *layer, const float *x, float *out, size_t samples, size_t height,
                  size_t width, const float *alpha, const float *bias, const float *scale, size_t threads) {
    return convolve(layer, x, out, NULL, NULL, samples, height, width, alpha, bias, scale, threads);
}

int tbn_conv_store(const struct tbn_conv *layer, const struct tbn_conv_input *input, const struct tbn_store *store,
                   const float *alpha, const float *bias, const float *scale, size_t threads) {
    return convolve(layer, input->x, NULL, input, store, input->samples, input->height, input->width, alpha, bias, scale,
                    threads);
}
