/* Inputs as bytes for products: the images of convolutions, and tokens. */
#include <string.h>

#include "dots.h"

/* Every `mixes`-th of `count` bytes. */
TBN_INLINE void take_every(const uint8_t *bytes, size_t count, size_t mixes, uint8_t *restrict out) {
    for (size_t i = 0; i < count; i++)
        out[i] = bytes[i * mixes];
}

/* The same of floats. */
static void take_every_float(const uint8_t *bytes, size_t count, size_t mixes, uint8_t *restrict out) {
    for (size_t i = 0; i < count; i++)
        memcpy(out + i * sizeof(float), bytes + i * mixes * sizeof(float), sizeof(float));
}

/* Deals the values of one token or position out to its column groups, `count` each, which lie `apart` bytes apart. */
static void deal_out(const struct call *call, const uint8_t *values, size_t count, uint8_t *out, size_t apart) {
    const size_t mixes = call->mixes, size = call->value_bytes;
    for (size_t mix = 0; mix < mixes; mix++, out += apart) {
        const uint8_t *from = values + mix * size;
        if (mixes == 1)
            memcpy(out, from, count * size);
        else if (size > 1)
            take_every_float(from, count, mixes, out);
        else
            switch (mixes) { /* numbers that the compiler knows make vectors */
            case 2: take_every(from, count, 2, out); break;
            case 4: take_every(from, count, 4, out); break;
            case 8: take_every(from, count, 8, out); break;
            default: take_every(from, count, mixes, out);
            }
    }
}

/* `size` neighbouring bytes of each of `count` pixels, `pixel` bytes apart. */
TBN_INLINE void copy_pixels(const uint8_t *bytes, size_t count, size_t size, uint8_t *restrict out, size_t pixel) {
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
    const size_t size = call->value_bytes, count = call->width * channels;
    const size_t apart = call->unfolded ? call->unfolded_bytes : call->limb_bytes;
    if (images == 1 && call->unfolded_pixel == channels * size) {
        call->dots->bytes(x, count, call->activation, factor, row, apart);
        return;
    }
    call->dots->bytes(x, count, call->activation, factor, call->whole, call->whole_bytes);
    for (size_t limb = 0; limb < call->limbs; limb++, row += apart) {
        const uint8_t *whole = call->whole + limb * call->whole_bytes;
        if (images == 1) {
            spread(whole, call->width, channels * size, row, call->unfolded_pixel);
            continue;
        }
        const size_t group_channels = layer->channels * call->mixes;
        for (size_t i = 0; i < call->width * call->groups; i++) {
            const size_t group = i % call->groups;
            deal_out(call, whole + i * group_channels * size, layer->channels,
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
TBN_INLINE void fold_row(const uint8_t *from, size_t columns, size_t rows, size_t apart, size_t pixel,
                         uint8_t *restrict out) {
    for (size_t x = 0; x < columns; x++)
        for (size_t k = 0; k < rows; k++)
            memcpy(out + (x * rows + k) * pixel, from + k * apart + x * pixel, pixel);
}

void tbn_fold_image(const struct call *call, const uint8_t *from, uint8_t *to) {
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

void tbn_make_images(const struct call *call, size_t sample) {
    const size_t images = call->groups * call->mixes;
    uint8_t *to = call->bytes + sample * images * call->image_bytes;
    fill_images(call, sample, call->unfolded ? call->unfolded : to);
    for (size_t limb = 0; call->unfolded && limb < call->limbs; limb++)
        for (size_t image = 0; image < images; image++)
            tbn_fold_image(call, call->unfolded + limb * call->unfolded_bytes + image * call->unfolded_image,
                       to + limb * call->limb_bytes + image * call->image_bytes);
}

void tbn_fill_token(const struct call *call, size_t token) {
    const struct tbn_linear *layer = call->linear;
    const float *x = call->x + token * layer->inputs;
    float factor;
    call->scales[token] = call->dots->measure(x, layer->inputs, call->activation, call->scale, &factor);
    uint8_t *out = call->bytes + token * call->pixel_bytes;
    call->dots->bytes(x, layer->inputs, call->activation, factor, call->mixes == 1 ? out : call->whole, 0);
    if (call->mixes > 1)
        deal_out(call, call->whole, layer->inputs / call->mixes, out, call->image_bytes);
}
