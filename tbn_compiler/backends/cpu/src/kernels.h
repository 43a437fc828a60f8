/*
 * What a vector level (AVX-512, AVX2, NEON, portable C) provides, and the jobs that it is given.
 *
 * A tile holds one bit a weight. `group` neighbouring inputs can be summed with 2^group patterns of signs only, so
 * all these sums are put in a table once, and every row of the tile looks its own up: one addition serves `group`
 * multiply-adds. The prepared tile ("index") holds the table entries that the rows look up, `rows` rows side by side
 * in one vector, `groups` of them in each word of a lane, the first group in the lowest bits.
 */
#ifndef TBN_KERNELS_H
#define TBN_KERNELS_H

#include "platform.h"

#include <stddef.h>
#include <stdint.h>

enum tbn_activation { TBN_FLOAT = 0, TBN_INT8 = 1, TBN_BINARY = 2 };

/* Largest vector, in bytes: alignment of tables, prepared tiles and scratch. */
#define TBN_ALIGN 64

/* Integer tables hold 16-bit sums, added in 16 bits: 256 inputs of magnitude 127 are the most that cannot overflow. */
enum { TBN_MAX_INT16_INPUTS = 256 };

/* Most rows of a row block of a float tile, whose words are `uint32_t` at every level. */
enum { TBN_MAX_FLOAT_ROWS = 16 };

/* Layout of a prepared tile and of the tables that it looks up. */
struct tbn_format {
    size_t rows;        /* rows side by side in a row block */
    size_t word_bytes;  /* bytes of a lane's word */
    size_t groups;      /* groups of inputs in a word */
    size_t group;       /* inputs in a group */
    size_t table_bytes; /* bytes of the table of one group */
};

/* z[lane][row] (+)= sum over groups of tables[group][lane][entry(row, group)] */
struct tbn_lookup {
    const void *index;       /* first word of the first row block */
    size_t index_stride;     /* bytes between row blocks */
    size_t row_blocks;       /* row blocks to compute */
    size_t words;            /* words to add */
    const void *tables;      /* tables of consecutive lanes follow one another */
    const uint32_t *offsets; /* byte offset of lane 0's table for each group of each word */
    size_t lanes;            /* inputs (tokens or positions) that share the prepared tile */
    void *z;                 /* float or int32, row blocks one behind the other */
    size_t z_stride;         /* elements between lanes */
    int accumulate;          /* add to z instead of writing it */
};

/* Tables in memory, a batch side by side: each entry is a vector of TBN_BATCH tokens. A pass is TBN_SUMS_INPUTS inputs, whose
   signs a row has in a word, and which make tables of four or of six. */
enum { TBN_BATCH = 16, TBN_SUMS_INPUTS = 48, TBN_SUMS_TABLES_BYTES = TBN_SUMS_INPUTS / 6 * 64 * TBN_BATCH * 4 };

/* out[token][row] = sum over passes and tables of an entry */
struct tbn_sums {
    const uint64_t *index; /* [pass][row]: bits set for +1 */
    size_t index_stride;   /* words between passes */
    size_t layer_rows;     /* of the whole layer, by which tables are chosen: threads change no bit */
    size_t rows;
    size_t inputs;
    const float *x; /* [tokens][inputs] */
    size_t tokens;  /* at most TBN_BATCH */
    void *tables;      /* room of TBN_SUMS_TABLES_BYTES */
    float *z;          /* room for [rows][TBN_BATCH] */
    float *out;        /* [tokens][rows] */
};

/* out[copy * rows + row] = alpha * z[row] * scale + bias, and the larger of that and 0 if relu */
struct tbn_finish {
    size_t rows;   /* different rows */
    size_t copies; /* outputs are copies * rows */
    const float *alpha;
    size_t alpha_copy_stride, alpha_row_stride;
    const float *bias; /* one for each output, or NULL */
    int relu;
};

/*
 * Products of bytes. Inputs are bytes, the integer plus 128, and meet rows of weights +1 and -1. A tile is TBN_DOT_INPUTS
 * inputs (tokens or positions), a step is TBN_DOT_BYTES neighbouring bytes of each, a block is TBN_DOT_ROWS rows. Levels
 * differ in what a tile is: where they `gather`, its inputs lie anywhere, and there are none past the last one; else they lie
 * at equal distances, so that a tile ends with the row of an image, and inputs may lie past the last one. Bytes of a step may
 * lie past those that count, and have no part in the sums. There is memory to read, and nobody reads what comes of it.
 *
 * Machines that multiply four or more bytes an instruction need no tables: weights are stored as bits and made bytes for two
 * blocks at a time, which all tiles meet, and what the 128 add to a sum is a number of the row, and taken off when the row is
 * finished. Others have tables in memory, and read the bits `by_rows` (dots_tables.h).
 *
 * Floats become integers of 24 bits, q = x / scale with a power of two for each sample, and these three bytes (limbs):
 * q + 2^23 = 2^16 * limb 0 + 2^8 * limb 1 + limb 2. Their zeros are TBN_DOT_ZERO, 0 and 0, so that only the sums
 * of the first limb have something to be taken off. Sums are put together without rounding, and rounded once.
 */
enum { TBN_DOT_INPUTS = 16, TBN_DOT_ROWS = 16, TBN_DOT_BYTES = 64, TBN_DOT_ZERO = 128 };

enum { TBN_LIMBS = 3 };

/* Inputs that are gathered at once, at least. */
enum { TBN_DOT_GATHERED = 4 };

/* Floats whose largest magnitude is more than so many times their mean magnitude, or not in [2^-100, 2^100), are looked
   up: their integers would be too coarse for most of them, and scales and sums stay away from float's ends. */
#define TBN_LIMB_RANGE 256.0

/* Bytes of a step and block: weights of 4 neighbouring bytes of 16 rows, then those of the next 4. */
enum { TBN_DOT_STEP = TBN_DOT_BYTES * TBN_DOT_ROWS };

/* A step: where its bytes lie from an input on, and how many fours of them count. */
struct tbn_dot_step {
    size_t offset, fours;
};

/* z[tile][input][row] = sum over steps and their bytes of byte * weight */
struct tbn_dot {
    const uint8_t *const *tiles; /* where each tile begins; gathered: [tile][TBN_DOT_INPUTS], where each input does, and
                                    from a multiple of TBN_DOT_GATHERED on NULL where there are no more */
    size_t count;                /* tiles */
    size_t stride;               /* bytes between the inputs of a tile that is not gathered */
    const struct tbn_dot_step *places;
    size_t steps;
    const uint64_t *index; /* bits of the weights, set for +1: [block][step][TBN_DOT_BYTES / 4], a bit for each byte, or
                              `by_rows` */
    size_t blocks;
    int8_t *weights; /* room for those of two blocks as bytes, or for tables */
    int32_t *z;      /* [tile][TBN_DOT_INPUTS][blocks * TBN_DOT_ROWS] */
};

/* Results: value = (sum + correction) * alpha * scale + bias, and the larger of that and 0 if relu. */
struct tbn_dot_finish {
    const int32_t *correction; /* NULL: sums are floats, from `combine` */
    const float *alpha, *bias; /* these three: one for each row; `bias` may be NULL */
    const float *scales;       /* of the inputs, `scale_step` apart */
    size_t scale_step;         /* 0: all have the same */
    int relu;
};

/* What becomes of finished results in a network (struct tbn_store, dots.h): of one input after the other, `step` apart. */
struct tbn_dot_store {
    float rounded, rounded_factor; /* the factor is 0 where they are not rounded */
    const float *added;            /* or NULL */
    const uint8_t *added_bytes;    /* or NULL */
    size_t added_step;
    float added_scale;
    int relu;
    float *floats; /* or NULL */
    size_t floats_step;
    uint8_t *bytes; /* or NULL */
    size_t bytes_step;
    float factor;
};

/*
 * A pixel that several places of a kernel meet, in as many blocks of a convolution's results as there are lanes: its tables
 * are made once, and serve all of them. A visit is one place of the kernel, for one position of the blocks.
 */
struct tbn_dot_visit {
    size_t step; /* the first of the place */
    char *sums;  /* of the position; a first step writes them */
};

struct tbn_dot_pixel {
    const uint8_t *const *inputs; /* of all lanes */
    size_t runs;                  /* steps of a place, all of TBN_DOT_BYTES */
    const struct tbn_dot_visit *visits;
    size_t count;
    const uint64_t *index; /* of all steps, `by_rows` */
    size_t rows, steps;    /* rows: a multiple of TBN_DOT_ROWS */
    char *tables;          /* room */
};

struct tbn_dot_sharing {
    size_t lanes;       /* a multiple of TBN_DOT_INPUTS */
    size_t table_bytes; /* of room */
    size_t sum_bytes;   /* of a row and a position, in all lanes */
    void (*add)(const struct tbn_dot_pixel *job);
    /* The sums of a position: [lane][row]. */
    void (*take)(const char *sums, size_t rows, int32_t *z);
};

struct tbn_dots {
    int gathers;
    int by_rows; /* bits of the weights: [step][row], those of a row in a word; and sums are of integers, not of bytes, so that
                    nothing is taken off */
    /* A thread calls these before and after its products. */
    void (*begin)(void);
    void (*end)(void);
    /* Bytes of room that a product takes, of so many steps and blocks. */
    size_t (*room)(size_t steps, size_t blocks);
    void (*multiply)(const struct tbn_dot *job);
    /* The same of floats in the place of bytes, and sums in floats; NULL: floats are limbs, or with no
       `combine` looked up. */
    void (*multiply_floats)(const struct tbn_dot *job);
    const struct tbn_dot_sharing *sharing, *sharing_floats; /* of bytes and of floats as they are; NULL: there is none */
    /* What stands for inputs: the scale, `*fixed` unless that is NULL or they stay floats, and the factor that makes them
       integers, 0 where all of them become 0. The scale of floats is a NaN if they have to be looked up, and 1 if they stay
       as they are. */
    float (*measure)(const float *x, size_t count, enum tbn_activation activation, const float *fixed, float *factor);
    /* Limbs of floats lie `apart` bytes apart; or floats stay as they are, 4 bytes each. */
    void (*bytes)(const float *x, size_t count, enum tbn_activation activation, float factor, uint8_t *out,
                  size_t apart);
    /* Bytes of `channels` planes `plane` elements apart, those of one position side by side, positions `stride` apart. */
    void (*bytes_of_planes)(const float *x, size_t plane, size_t channels, size_t positions,
                            enum tbn_activation activation, float factor, uint8_t *out, size_t stride, size_t apart);
    /* Puts the sums of limbs, `apart` elements apart, together, as floats in the place of those of the first limb. They
       are of `inputs` inputs, whose sums lie `z_stride` apart, and of `rows` rows; `correction` is that of the first limb. */
    void (*combine)(int32_t *z, size_t z_stride, size_t apart, const int32_t *correction, size_t rows, size_t inputs);
    /* Results of `rows` rows and `inputs` inputs of a tile, whose sums lie `z_stride` apart: those of an input side by
       side, inputs `step` elements apart; or those of a row side by side, rows `step` elements apart, with one scale,
       of `outputs` rows: behind the last one follow those of another copy, with alphas and biases of their own. */
    void (*finish_inputs)(const struct tbn_dot_finish *job, const int32_t *z, size_t z_stride, size_t rows,
                          size_t inputs, float *out, size_t step);
    void (*finish_rows)(const struct tbn_dot_finish *job, const int32_t *z, size_t z_stride, size_t rows, size_t outputs,
                        size_t inputs, float *out, size_t step);
    /* The same as finish_inputs, with more done to results. */
    void (*store_inputs)(const struct tbn_dot_finish *job, const struct tbn_dot_store *store, const int32_t *z,
                         size_t z_stride, size_t rows, size_t inputs);
    /* The largest of `count` neighbouring values each: out[i] = max over k of from[k][i]. */
    void (*max_bytes)(const uint8_t *const *from, size_t taps, size_t count, uint8_t *out);
    void (*max_floats)(const float *const *from, size_t taps, size_t count, float *out);
};

struct tbn_attention_kernels; /* attention.h */

struct tbn_kernels {
    const char *name;
    const struct tbn_dots *dots; /* NULL: integers are looked up */
    const struct tbn_attention_kernels *attention; /* NULL: there is none */
    struct tbn_format f32, i16;
    /* Tables of `count` groups, the inputs of successive groups `stride` elements apart. */
    void (*tables_f32)(const float *x, size_t stride, size_t count, void *tables, size_t table_stride);
    void (*tables_i16)(const int16_t *x, size_t stride, size_t count, void *tables, size_t table_stride);
    void (*lookup_f32)(const struct tbn_lookup *job);
    void (*lookup_i16)(const struct tbn_lookup *job);
    void (*sums)(const struct tbn_sums *job);
    /* Results of `mixes` column groups, [mixes][count], as those of as many copies with Hadamard signs; see linear.c. */
    void (*mix_f32)(float *z, size_t mixes, size_t count);
    void (*mix_i32)(int32_t *z, size_t mixes, size_t count);
    /* Rows [first, last) of one token, from the sums of these rows; `scale` is the token's. */
    void (*finish_f32)(const struct tbn_finish *job, const float *z, size_t first, size_t last, float *out);
    void (*finish_i32)(const struct tbn_finish *job, const int32_t *z, float scale, size_t first, size_t last,
                       float *out);
    /* One channel: out = alpha * z * scale + bias[0], and the larger of that and 0 if relu. */
    void (*finish_plane)(const float *z, size_t count, float alpha, float scale, const float *bias, int relu,
                         float *out);
    /* Whether no sum is an infinity or a NaN. */
    int (*all_finite)(const float *z, size_t count);
    /* Integers of one token and the scale that they stand for, `*fixed` unless that is NULL; see ops/schemas.py. */
    float (*quantize)(const float *x, size_t count, int binary, const float *fixed, int16_t *q);
};

extern const struct tbn_kernels tbn_portable;
#if defined(TBN_X86)
extern const struct tbn_kernels tbn_avx2;
extern const struct tbn_kernels tbn_avx512, tbn_avx512vnni;
extern const struct tbn_dots tbn_dots_avx2, tbn_dots_vnni;
extern const struct tbn_attention_kernels tbn_attention_avx2, tbn_attention_avx512;
#if defined(TBN_AMX)
extern const struct tbn_kernels tbn_avx512amx;
extern const struct tbn_dots tbn_dots_amx;
#endif
#elif defined(TBN_ARM)
extern const struct tbn_kernels tbn_neon;
#endif

#endif
