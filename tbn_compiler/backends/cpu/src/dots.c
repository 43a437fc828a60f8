/*
 * Linear layers and convolutions as products of bytes (struct tbn_dots).
 *
 * Inputs are made bytes once. A convolution's stand in images with their padding, [row][column][channel], so that what
 * a position meets lies in a few runs of neighbouring bytes, at the same distances from the position: nothing is
 * unrolled. Images of few channels are folded: all rows that an output row meets stand in one, the bytes of a column
 * one behind the other, for which the kernel has a height of 1. A unit of work is a band of output rows of one sample and
 * one group, or a few tokens.
 *
 * Each limb of floats has images of its own, and its tiles stand behind those of the limb before: products do not know of
 * limbs, and weights are made bytes once for all. Samples that limbs do not stand for are looked up at the end.
 */
#include "pool.h"
#include "scratch.h"
#include "tbn_cpu.h"

#include <math.h>
#include <stdatomic.h>
#include <string.h>

/* Sums of a unit: what the second-level cache holds along with the rest. */
enum { SUMS_BUDGET = 192 * 1024, TOKEN_TILES = 8 };

/* One call: what its threads share. */
struct call {
    const struct tbn_dots *dots;
    const struct tbn_kernels *kernels;
    const struct tbn_linear *linear; /* one of these, the other is NULL */
    const struct tbn_conv *conv;
    const float *x;
    float *out;
    const float *alpha;  /* as it was given */
    const float *alphas; /* one for each output */
    const float *bias;
    const float *scale;  /* of all inputs, or NULL */
    enum tbn_activation activation;
    size_t limbs;        /* 1, or TBN_LIMBS */
    /* Images [limb][sample][group][column group][height][width][channel], or [column group][token][column]. */
    uint8_t *bytes;
    size_t limb_bytes;
    float *scales;       /* of the samples, or tokens */
    uint8_t *whole;      /* bytes of a token, or of a row of an image, before they are dealt out, [limb] */
    size_t whole_bytes;  /* of a limb */
    struct tbn_dot_step *places; /* of the steps */
    size_t steps;
    size_t rows, blocks, groups, mixes;
    size_t samples, height, width; /* of the input */
    size_t out_height, out_width;
    size_t row_bytes, image_bytes, pixel_bytes; /* of the images; pixel_bytes of tokens, too */
    size_t row_step;                            /* rows from an output row to the next */
    uint8_t *unfolded;                          /* [limb]: the images of one sample before they are folded, or NULL */
    size_t unfolded_bytes;                      /* of a limb */
    size_t unfolded_row, unfolded_image, unfolded_pixel; /* their bytes; those above where nothing is folded */
    size_t units, bands, band_rows, tiles;      /* tiles: the most of a unit */
    atomic_size_t next;
};

/* Buffers of one thread. */
struct buffers {
    const uint8_t **tiles; /* as struct tbn_dot has them, [limb] */
    int8_t *weights; /* of two blocks */
    int32_t *z;      /* [column group][limb][tile][input][row]; floats once limbs are put together */
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
    buffers->weights = tbn_take(&scratch, 2 * call->steps * TBN_DOT_STEP);
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
        call->dots->multiply(&job);
        for (size_t i = 0; mix + 1 < call->mixes && i < pointers(call, count); i++)
            buffers->tiles[i] = moved(buffers->tiles[i], apart);
    }
    call->kernels->mix_i32(buffers->z, call->mixes, z_mix);
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
    const size_t channels = call->groups * layer->channels_out, plane = call->out_height * call->out_width;
    for (size_t tile = 0; tile < tiles; tile++) {
        const size_t x = (gathers ? tile : tile % row_tiles) * TBN_DOT_INPUTS; /* from the band, or its row, on */
        const size_t first = (first_row + (gathers ? 0 : tile / row_tiles)) * call->out_width;
        const size_t inputs = tbn_min(TBN_DOT_INPUTS, (gathers ? rows : 1) * call->out_width - x);
        for (size_t j = 0; j < layer->channels_out; j += call->rows) {
            const size_t channel = group * layer->channels_out + j, mix = call->mixes > 1 ? j / call->rows : 0;
            const size_t count = tbn_min(call->rows, layer->channels_out - j);
            const int32_t *z = buffers->z + mix * z_size(call, call->limbs * tiles) + tile * TBN_DOT_INPUTS * z_row;
            const struct tbn_dot_finish finish = {
                .correction = call->limbs > 1 ? NULL : corrections + mix * call->rows,
                .alpha = call->alphas + channel,
                .bias = call->bias ? call->bias + channel : NULL,
                .scales = call->scales + sample,
                .relu = layer->relu,
            };
            const size_t position = first + x;
            if (layer->channels_last)
                call->dots->finish_inputs(&finish, z, z_row, count, inputs,
                                          call->out + (sample * plane + position) * channels + channel, channels);
            else
                call->dots->finish_rows(&finish, z, z_row, count, inputs,
                                        call->out + (sample * channels + channel) * plane + position, plane);
        }
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

static void run(void *argument) {
    struct call *call = argument;
    struct buffers buffers;
    char *memory = aligned_alloc(TBN_ALIGN, tbn_max(take_buffers(call, NULL, &buffers), TBN_ALIGN));
    if (!memory)
        return; /* the units are left to the other threads, or remain */
    take_buffers(call, memory, &buffers);
    call->dots->begin();
    for (;;) {
        const size_t unit = atomic_fetch_add(&call->next, 1);
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
    free(memory);
}

/* Every `mixes`-th of `count` bytes. */
static inline __attribute__((always_inline)) void take_every(const uint8_t *bytes, size_t count, size_t mixes,
                                                             uint8_t *restrict out) {
    for (size_t i = 0; i < count; i++)
        out[i] = bytes[i * mixes];
}

/* Deals the bytes of one token or position out to its column groups, `count` each, which lie `apart` bytes apart. */
static void deal_out(const uint8_t *bytes, size_t count, size_t mixes, uint8_t *out, size_t apart) {
    for (size_t mix = 0; mix < mixes; mix++, out += apart)
        switch (mixes) { /* numbers that the compiler knows make vectors */
        case 1: memcpy(out, bytes, count); break;
        case 2: take_every(bytes + mix, count, 2, out); break;
        case 4: take_every(bytes + mix, count, 4, out); break;
        case 8: take_every(bytes + mix, count, 8, out); break;
        default: take_every(bytes + mix, count, mixes, out);
        }
}

/* `size` neighbouring bytes of each of `count` pixels, `pixel` bytes apart. */
static inline __attribute__((always_inline)) void copy_pixels(const uint8_t *bytes, size_t count, size_t size,
                                                              uint8_t *restrict out, size_t pixel) {
    for (size_t i = 0; i < count; i++)
        memcpy(out + i * pixel, bytes + i * size, size);
}

static void spread(const uint8_t *bytes, size_t count, size_t size, uint8_t *out, size_t pixel) {
    switch (size) { /* numbers that the compiler knows make moves */
    case 1: copy_pixels(bytes, count, 1, out, pixel); break;
    case 2: copy_pixels(bytes, count, 2, out, pixel); break;
    case 3: copy_pixels(bytes, count, 3, out, pixel); break;
    default: copy_pixels(bytes, count, size, out, pixel);
    }
}

/* A row of an image in planes. */
static void fill_row_of_planes(const struct call *call, const float *x, float factor, uint8_t *row) {
    const struct tbn_conv *layer = call->conv;
    const size_t plane = call->height * call->width, apart = call->unfolded ? call->unfolded_bytes : call->limb_bytes;
    for (size_t image = 0; image < call->groups * call->mixes; image++) {
        /* The first channel of the column group; the others are `mixes` apart. */
        const size_t first = image / call->mixes * layer->channels * call->mixes + image % call->mixes;
        call->dots->bytes_of_planes(x + first * plane, plane * call->mixes, layer->channels, call->width,
                                    call->activation, factor, row + image * call->unfolded_image, call->unfolded_pixel,
                                    apart);
    }
}

/* A row of an image with the channels innermost. */
static void fill_row(const struct call *call, const float *x, float factor, uint8_t *row) {
    const struct tbn_conv *layer = call->conv;
    const size_t images = call->groups * call->mixes, channels = images * layer->channels;
    const size_t count = call->width * channels, apart = call->unfolded ? call->unfolded_bytes : call->limb_bytes;
    if (images == 1 && call->unfolded_pixel == channels) {
        call->dots->bytes(x, count, call->activation, factor, row, apart);
        return;
    }
    call->dots->bytes(x, count, call->activation, factor, call->whole, call->whole_bytes);
    for (size_t limb = 0; limb < call->limbs; limb++, row += apart) {
        const uint8_t *whole = call->whole + limb * call->whole_bytes;
        if (images == 1) {
            spread(whole, call->width, channels, row, call->unfolded_pixel);
            continue;
        }
        const size_t group_channels = layer->channels * call->mixes;
        for (size_t i = 0; i < call->width * call->groups; i++) {
            const size_t group = i % call->groups;
            deal_out(whole + i * group_channels, layer->channels, call->mixes,
                     row + group * call->mixes * call->unfolded_image + i / call->groups * call->unfolded_pixel,
                     call->unfolded_image);
        }
    }
}

/* The bytes of one sample in its images, which hold zeros at their borders. */
static void fill_images(const struct call *call, size_t sample, uint8_t *to) {
    const struct tbn_conv *layer = call->conv;
    const size_t plane = call->height * call->width, channels = call->groups * call->mixes * layer->channels;
    const float *x = call->x + sample * channels * plane;
    float factor;
    call->scales[sample] = call->dots->measure(x, channels * plane, call->activation, call->scale, &factor);
    for (size_t y = 0; y < call->height; y++) {
        uint8_t *row = to + (y + layer->padding[0]) * call->unfolded_row + layer->padding[1] * call->unfolded_pixel;
        if (layer->channels_last)
            fill_row(call, x + y * call->width * channels, factor, row);
        else
            fill_row_of_planes(call, x + y * call->width, factor, row);
    }
}

/* `rows` rows, `apart` bytes apart, as one: the pixels of a column one behind the other. */
static inline __attribute__((always_inline)) void fold_row(const uint8_t *from, size_t columns, size_t rows,
                                                           size_t apart, size_t pixel, uint8_t *restrict out) {
    for (size_t x = 0; x < columns; x++)
        for (size_t k = 0; k < rows; k++)
            memcpy(out + (x * rows + k) * pixel, from + k * apart + x * pixel, pixel);
}

/* Folds an image: what the kernel's rows meet, side by side for each column. */
static void fold_image(const struct call *call, const uint8_t *from, uint8_t *to) {
    const struct tbn_conv *layer = call->conv;
    const size_t columns = call->row_bytes / call->pixel_bytes, apart = layer->dilation[0] * call->unfolded_row;
    for (size_t y = 0; y < call->out_height; y++) {
        const uint8_t *row = from + y * layer->stride[0] * call->unfolded_row;
        uint8_t *out = to + y * call->row_bytes;
        if (call->unfolded_pixel == 4)
            switch (layer->kernel[0]) { /* numbers that the compiler knows */
            case 3: fold_row(row, columns, 3, apart, 4, out); break;
            case 5: fold_row(row, columns, 5, apart, 4, out); break;
            case 7: fold_row(row, columns, 7, apart, 4, out); break;
            default: fold_row(row, columns, layer->kernel[0], apart, 4, out);
            }
        else
            fold_row(row, columns, layer->kernel[0], apart, call->unfolded_pixel, out);
    }
}

/* The images of one sample, as the products read them. */
static void make_images(const struct call *call, size_t sample) {
    const size_t images = call->groups * call->mixes;
    uint8_t *to = call->bytes + sample * images * call->image_bytes;
    fill_images(call, sample, call->unfolded ? call->unfolded : to);
    for (size_t limb = 0; call->unfolded && limb < call->limbs; limb++)
        for (size_t image = 0; image < images; image++)
            fold_image(call, call->unfolded + limb * call->unfolded_bytes + image * call->unfolded_image,
                       to + limb * call->limb_bytes + image * call->image_bytes);
}

/* The bytes of one token, dealt out to its column groups. */
static void fill_token(const struct call *call, size_t token) {
    const struct tbn_linear *layer = call->linear;
    const float *x = call->x + token * layer->inputs;
    float factor;
    call->scales[token] = call->dots->measure(x, layer->inputs, call->activation, call->scale, &factor);
    uint8_t *out = call->bytes + token * call->pixel_bytes;
    call->dots->bytes(x, layer->inputs, call->activation, factor, call->mixes == 1 ? out : call->whole, 0);
    if (call->mixes > 1)
        deal_out(call->whole, layer->inputs / call->mixes, call->mixes, out, call->image_bytes);
}

/* The steps of a run of `bytes` bytes, a multiple of 4, `at` bytes from an input; written unless `places` is NULL. */
static size_t find_steps(size_t bytes, size_t at, struct tbn_dot_step *places) {
    const size_t steps = tbn_ceil_divide(bytes, TBN_DOT_BYTES);
    for (size_t i = 0; places && i < steps; i++) {
        places[i].offset = at + i * TBN_DOT_BYTES;
        places[i].fours = tbn_min(TBN_DOT_BYTES, bytes - i * TBN_DOT_BYTES) / 4;
    }
    return steps;
}

/* The steps of a convolution: a run for each row of the kernel, or for each place in it. */
static size_t conv_steps(const struct call *call, struct tbn_dot_step *places) {
    const struct tbn_conv *layer = call->conv;
    const size_t runs = layer->dilation[1] == 1 ? 1 : layer->kernel[1]; /* of a row */
    const size_t bytes = layer->kernel[1] / runs * call->pixel_bytes;
    size_t steps = 0;
    for (size_t y = 0; y < (layer->folded ? 1 : layer->kernel[0]); y++)
        for (size_t x = 0; x < runs; x++)
            steps += find_steps(bytes,
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

/* Looks up what limbs do not stand for, each sample on its own, so that no other one changes its result. */
static int look_up(const struct call *call, size_t threads) {
    int status = TBN_OK;
    for (size_t sample = 0; call->limbs > 1 && status == TBN_OK && sample < call->samples; sample++)
        if (isnan(call->scales[sample]))
            status = look_up_sample(call, sample, threads);
    return status;
}

/* Allocates what all threads share, makes bytes of the inputs, and runs the units. */
static int compute(struct call *call, size_t threads, size_t outputs, size_t alpha_rows, size_t images, size_t slack,
                   size_t whole) {
    const int folded = call->conv && call->conv->folded;
    struct tbn_scratch parts = {NULL, 0};
    call->limb_bytes = tbn_round_up(images * call->image_bytes + slack, TBN_ALIGN);
    call->whole_bytes = whole;
    call->unfolded_bytes = call->groups * call->mixes * call->unfolded_image;
    tbn_take(&parts, call->limbs * call->limb_bytes);
    const size_t at_scales = parts.used;
    tbn_take(&parts, call->samples * sizeof(float));
    const size_t at_places = parts.used;
    tbn_take(&parts, call->steps * sizeof(struct tbn_dot_step));
    const size_t at_alphas = parts.used;
    tbn_take(&parts, outputs * sizeof(float));
    const size_t at_whole = parts.used;
    tbn_take(&parts, call->limbs * whole);
    const size_t at_unfolded = parts.used;
    tbn_take(&parts, folded ? call->limbs * call->unfolded_bytes : 0);
    char *memory = aligned_alloc(TBN_ALIGN, parts.used);
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
    for (size_t limb = 0; limb < call->limbs; limb++) {
        const int zero = limb ? 0 : TBN_DOT_ZERO;
        uint8_t *bytes = call->bytes + limb * call->limb_bytes;
        if (folded) {
            memset(call->unfolded + limb * call->unfolded_bytes, zero, call->unfolded_bytes);
            memset(bytes + images * call->image_bytes, zero, slack);
        } else
            memset(bytes, zero, images * call->image_bytes + slack);
    }
    if (call->conv)
        conv_steps(call, call->places);
    else
        find_steps(call->pixel_bytes, 0, call->places);
    for (size_t sample = 0; sample < call->samples; sample++) {
        if (call->conv)
            make_images(call, sample);
        else
            fill_token(call, sample);
    }
    tbn_parallel(tbn_min(threads, call->units), run, call);
    const int status = atomic_load(&call->next) < call->units ? TBN_OUT_OF_MEMORY : look_up(call, threads);
    free(memory);
    return status;
}

int tbn_linear_dots(const struct tbn_linear *layer, const float *x, float *out, size_t tokens, const float *alpha,
                    const float *bias, const float *scale, size_t threads) {
    const size_t columns = layer->inputs / layer->mixes, outputs = layer->copies * layer->rows;
    struct call call = {
        .dots = layer->kernels->dots, .kernels = layer->kernels, .linear = layer, .x = x, .out = out, .alpha = alpha,
        .bias = bias, .scale = scale,
        .activation = (enum tbn_activation)layer->activation, .limbs = 1,
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

int tbn_conv_dots(const struct tbn_conv *layer, const float *x, float *out, size_t samples, size_t height,
                  size_t width, const float *alpha, const float *bias, const float *scale, size_t threads) {
    struct call call = {
        .dots = layer->kernels->dots, .kernels = layer->kernels, .conv = layer, .x = x, .out = out, .alpha = alpha,
        .bias = bias, .scale = scale,
        .activation = (enum tbn_activation)layer->activation, .limbs = layer->activation == TBN_FLOAT ? TBN_LIMBS : 1,
        .rows = layer->rows, .blocks = tbn_ceil_divide(layer->rows, TBN_DOT_ROWS), .groups = layer->groups,
        .mixes = layer->mixes, .samples = samples, .height = height, .width = width,
        .out_height = tbn_output_size(layer, 0, height), .out_width = tbn_output_size(layer, 1, width),
        .unfolded_pixel = tbn_round_up(layer->channels, 4), .row_step = layer->folded ? 1 : layer->stride[0],
    };
    if (samples == 0)
        return TBN_OK;
    const size_t columns = width + 2 * layer->padding[1];
    call.unfolded_row = columns * call.unfolded_pixel;
    call.unfolded_image = (height + 2 * layer->padding[0]) * call.unfolded_row;
    call.pixel_bytes = call.unfolded_pixel * (layer->folded ? layer->kernel[0] : 1);
    call.row_bytes = columns * call.pixel_bytes;
    call.image_bytes = layer->folded ? call.out_height * call.row_bytes : call.unfolded_image;
    call.steps = conv_steps(&call, NULL);
    const size_t row_sums = call.mixes * z_size(&call, call.limbs * band_tiles(&call, 1)) * sizeof(int32_t);
    call.band_rows = tbn_min(call.out_height, tbn_max(1, SUMS_BUDGET / row_sums));
    const size_t bands = tbn_ceil_divide(threads, samples * call.groups); /* enough for every thread */
    call.band_rows = tbn_min(call.band_rows, tbn_ceil_divide(call.out_height, bands));
    call.bands = tbn_ceil_divide(call.out_height, call.band_rows);
    call.tiles = band_tiles(&call, call.band_rows);
    call.units = samples * call.groups * call.bands;
    /* The last inputs of the last tile, and the last step of the last run, end behind the image. */
    const size_t slack =
        (TBN_DOT_INPUTS * layer->stride[1] + layer->kernel[1] * layer->dilation[1]) * call.pixel_bytes + TBN_DOT_BYTES;
    return compute(&call, threads, call.groups * layer->channels_out, layer->alpha_rows,
                   samples * call.groups * call.mixes, slack,
                   layer->channels_last ? width * call.groups * layer->channels * call.mixes : 0);
}
