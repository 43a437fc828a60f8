/* Products of bytes: what a call's threads share, and what its parts do for each other. */
#ifndef TBN_DOTS_H
#define TBN_DOTS_H

#include "scratch.h"
#include "tbn_cpu.h"

/* Images of bytes, the integer plus TBN_DOT_ZERO, with zeros at their borders: [sample][row][column][channel]. */
struct tbn_bytes {
    uint8_t *first;           /* of the first pixel inside the borders; NULL: there are none */
    size_t pixel, row, image; /* bytes from one to the next */
};

static inline uint8_t *tbn_pixel(const struct tbn_bytes *bytes, size_t sample, size_t y, size_t x) {
    return bytes->first + sample * bytes->image + y * bytes->row + x * bytes->pixel;
}

/* What becomes of the results of a convolution in a network, in this order. Floats are [sample][position][channel]. */
struct tbn_store {
    float rounded;           /* unless 0: they are brought into int8 with this scale, and back */
    const float *added;      /* what is added, or NULL, */
    struct tbn_bytes added_bytes; /* or here, with this scale */
    float added_scale;
    int relu;
    float *floats; /* where they go, or NULL */
    struct tbn_bytes bytes; /* where they go in int8 with this scale */
    float scale;
};

/* What a convolution in a network takes. */
struct tbn_conv_input {
    const float *x;         /* as tbn_conv_dots takes it, or NULL */
    struct tbn_bytes bytes; /* in its place: of one group without column groups, with borders for the padding */
    size_t samples, height, width;
    float *scales; /* takes the scale of each sample of floats: a NaN where it holds one */
};

/* One call: what its threads share. */
struct call {
    const struct tbn_dots *dots;
    const struct tbn_kernels *kernels;
    const struct tbn_linear *linear; /* one of these, the other is NULL */
    const struct tbn_conv *conv;
    const float *x;
    float *out;                    /* or, of a convolution in a network: */
    const struct tbn_store *store;
    const struct tbn_conv_input *input;
    const float *alpha;  /* as it was given */
    const float *alphas; /* one for each output */
    const float *bias;
    const float *scale;  /* of all inputs, or NULL */
    enum tbn_activation activation;
    size_t limbs;        /* 1, or TBN_LIMBS */
    size_t value_bytes;  /* of an input: 1, or those of a float as it is, of which all below speaks as bytes */
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
    size_t units, bands, band_rows, tiles;      /* tiles: the most of a unit; these three are not those of blocks */
    const struct tbn_dot_sharing *sharing;      /* NULL: results are computed by bands */
    size_t block[2], block_count[2];            /* of a sample: height and width of blocks, and how many there are */
    tbn_counter next;
};

/* bytes.c: the images of one sample, as the products read them; an image folded, what the kernel's rows meet side by side for
   each column; the bytes of one token, dealt out to its column groups. */
void tbn_make_images(const struct call *call, size_t sample);
void tbn_fold_image(const struct call *call, const uint8_t *from, uint8_t *to);
void tbn_fill_token(const struct call *call, size_t token);

/* Pixels from the first place of a kernel to its last one, along one axis. */
static inline size_t tbn_reach(const struct tbn_conv *layer, int axis) {
    return layer->dilation[axis] * (layer->kernel[axis] - 1);
}

/* Whether inputs are floats as they are. */
static inline int tbn_takes_floats(const struct call *call) {
    return call->value_bytes == sizeof(float);
}

/* Mixes the sums of column groups, `count` of each. */
static inline void tbn_mix(const struct call *call, int32_t *z, size_t count) {
    if (tbn_takes_floats(call))
        call->kernels->mix_f32((float *)(void *)z, call->mixes, count);
    else
        call->kernels->mix_i32(z, call->mixes, count);
}

/* shared.c: decides whether the tables of a pixel serve all places of the kernel, and divides the results into blocks for it;
   the memory that a thread takes; computes the blocks of a unit. */
void tbn_plan_sharing(struct call *call, size_t threads);
size_t tbn_sharing_room(const struct call *call);
void tbn_share(const struct call *call, char *memory, size_t unit);

/* Finishes the results of neighbouring positions of one sample and group, whose sums lie `z_input` elements apart, and those of
   its column groups `z_mix`. */
void tbn_finish_positions(const struct call *call, const int32_t *z, size_t z_input, size_t z_mix, size_t sample, size_t group,
                          size_t position, size_t inputs);

/* A convolution of int8 in a network. */
int tbn_conv_store(const struct tbn_conv *layer, const struct tbn_conv_input *input, const struct tbn_store *store,
                   const float *alpha, const float *bias, const float *scale, size_t threads);

/* Bytes behind an image that products of `layer` may read: the last inputs of the last tile, and the last step of the last
   run, end there. */
static inline size_t tbn_slack(const struct tbn_conv *layer, size_t pixel_bytes, size_t value_bytes) {
    return (TBN_DOT_INPUTS * layer->stride[1] + layer->kernel[1] * layer->dilation[1]) * pixel_bytes +
           TBN_DOT_BYTES * value_bytes;
}

#endif
