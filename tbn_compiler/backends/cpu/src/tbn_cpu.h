/* The library's interface. Sizes are in elements unless they say bytes; every pointer is to contiguous memory. */
#ifndef TBN_CPU_H
#define TBN_CPU_H

#include <stdbool.h>

#include "attention.h"
#include "kernels.h"

/* Changes with anything below: a library left over from another version is not used. */
enum { TBN_INTERFACE = 12 };

TBN_EXPORT int tbn_interface(void);

enum { TBN_OK = 0, TBN_OUT_OF_MEMORY = 1, TBN_MISFIT = 2 };

/*
 * A linear layer. backends/cpu/library.py declares the same fields.
 *
 * With `mixes` above 1 copies have Hadamard signs: input c belongs to column group c mod `mixes`, and has the sign
 * H[i, c mod mixes] in copy i. There is a prepared tile for each column group, one behind the other, and as many copies.
 */
struct tbn_linear {
    const struct tbn_kernels *kernels;
    const void *index;      /* tile prepared by tbn_pack for the activation's format */
    const void *sums_index; /* tile prepared by tbn_pack_sums, or NULL: no batch kernel */
    size_t inputs;
    size_t rows;   /* different rows */
    size_t copies; /* outputs are copies * rows */
    size_t mixes;  /* column groups, a power of two; 1: copies are equal */
    size_t alpha_copy_stride, alpha_row_stride;
    int32_t activation;
    int32_t relu;
    const int32_t *corrections; /* for products of bytes: [mixes][rows]; see struct tbn_dots */
};

/*
 * A convolution; axis 0 is the height, of size 1 in one dimension. Padding is with zeros. Column groups (`mixes`) are of
 * the input channels of a group; they have prepared tiles one behind the other in that of their group.
 */
struct tbn_conv {
    const struct tbn_kernels *kernels;
    const void *index; /* a tile prepared by tbn_pack for each group, columns [channel group][tap][channel] */
    size_t groups;
    size_t channels;     /* input channels of a column group */
    size_t channels_out; /* output channels of a group; channel j is of copy j / `rows`, and of filter j mod `rows` */
    size_t rows;         /* different filters of a group */
    size_t mixes;
    size_t alpha_rows;   /* neighbouring output channels that share an alpha */
    size_t kernel[2], stride[2], padding[2], dilation[2];
    int32_t activation;
    int32_t relu;
    const int32_t *corrections; /* for products of bytes: [groups][mixes][rows] */
    int32_t channels_last;      /* products of bytes: input and output are [samples][height][width][channels] */
    int32_t folded;             /* products of bytes: images are folded, see dots.c */
    const struct tbn_conv *lookups; /* products of bytes of floats: the same layer for tbn_conv */
};

/* Outputs along one axis. */
static inline size_t tbn_output_size(const struct tbn_conv *layer, int axis, size_t size) {
    return (size + 2 * layer->padding[axis] - layer->dilation[axis] * (layer->kernel[axis] - 1) - 1) /
               layer->stride[axis] + 1;
}

/* Kernels of a level by name, or NULL where the machine does not run it. */
TBN_EXPORT const struct tbn_kernels *tbn_level(const char *name);

/* Bytes of a prepared tile of `rows` rows of `columns` weights; `integer` picks the format of integer activations. */
TBN_EXPORT size_t tbn_pack_bytes(const struct tbn_kernels *kernels, int integer, size_t rows, size_t columns);
TBN_EXPORT size_t tbn_pack_sums_bytes(size_t rows, size_t columns);

/* Inputs that share a table. */
TBN_EXPORT size_t tbn_group(const struct tbn_kernels *kernels, int integer);

/* Prepares a tile from `signs` [rows][columns], positive for +1. */
TBN_EXPORT void tbn_pack(const struct tbn_kernels *kernels, int integer, const int8_t *signs, size_t rows,
                         size_t columns, void *index);
TBN_EXPORT void tbn_pack_sums(const int8_t *signs, size_t rows, size_t columns, void *index);

/*
 * x [tokens][inputs] -> out [tokens][copies * rows]; returns TBN_OK or TBN_OUT_OF_MEMORY. `scale` is that of all inputs in
 * another number format, or NULL: each token has its own.
 */
TBN_EXPORT int tbn_linear(const struct tbn_linear *layer, const float *x, float *out, size_t tokens,
                          const float *alpha, const float *bias, const float *scale, size_t threads);

/* x [samples][groups * channels * mixes][height][width] -> out, in the same order; returns TBN_OK or TBN_OUT_OF_MEMORY. */
TBN_EXPORT int tbn_conv(const struct tbn_conv *layer, const float *x, float *out, size_t samples, size_t height,
                        size_t width, const float *alpha, const float *bias, const float *scale, size_t threads);

/*
 * The same with kernels that have `dots`; linear layers only with int8 and binary activations. The index (struct
 * tbn_dot) is one for each group, and for each column group. The columns of a row are its bytes of an input: those of
 * a linear layer from step to step, those of a convolution for each row of its kernel, [column of the
 * kernel][channel], if its dilation along a row is 1, and else for each place in the kernel, [channel]. In a `folded`
 * layer they are [column of the kernel][row][channel] for the whole kernel, or else [row][channel] for each of its
 * columns. Channels are filled up to a multiple of 4, a token's bytes to whole steps; bits that fill up are those of
 * weights that inputs of 0 meet, and corrections, zeros where bits lie by rows, know them.
 */
TBN_EXPORT int tbn_linear_dots(const struct tbn_linear *layer, const float *x, float *out, size_t tokens,
                               const float *alpha, const float *bias, const float *scale, size_t threads);
TBN_EXPORT int tbn_conv_dots(const struct tbn_conv *layer, const float *x, float *out, size_t samples, size_t height,
                             size_t width, const float *alpha, const float *bias, const float *scale, size_t threads);

/* Whether kernels have `dots`; whether these read the bits of weights by rows; and whether they take floats, as limbs or as
   they are. */
TBN_EXPORT int tbn_has_dots(const struct tbn_kernels *kernels);
TBN_EXPORT int tbn_dots_by_rows(const struct tbn_kernels *kernels);
TBN_EXPORT int tbn_has_limbs(const struct tbn_kernels *kernels);
TBN_EXPORT int tbn_keeps_floats(const struct tbn_kernels *kernels);

/*
 * A layer with its operands, as the operators `tbn_cpu::linear` and `tbn_cpu::conv` take it: as the bytes of a tensor.
 * What it points to belongs to the tensor.
 */
struct tbn_form {
    const void *layer; /* struct tbn_linear or tbn_conv, or NULL */
    union {
        int (*linear)(const struct tbn_linear *layer, const float *x, float *out, size_t tokens, const float *alpha,
                      const float *bias, const float *scale, size_t threads);
        int (*conv)(const struct tbn_conv *layer, const float *x, float *out, size_t samples, size_t height,
                    size_t width, const float *alpha, const float *bias, const float *scale, size_t threads);
    };
};

struct tbn_bound {
    const void *self;         /* its own address */
    struct tbn_form forms[2]; /* linear: for fewer than TBN_MIN_BATCH tokens, and from there on; conv: for images in planes,
                                 and with their channels innermost (NULL: they are brought into planes) */
    const float *alpha, *bias, *scale; /* `bias` and `scale` may be NULL */
    size_t inputs, outputs; /* features, or channels of all groups */
    int64_t dims;           /* of positions: 0, 1 or 2 */
};

enum { TBN_MIN_BATCH = 12 };

/*
 * A network of layers with fixed scales, as the operator `tbn_cpu::network` takes it: as the bytes of a tensor. Value 0 is
 * its input, floats; the output of the last step is its result, floats. Each step writes a value of its own.
 */
enum tbn_step_kind { TBN_STEP_CONV, TBN_STEP_LINEAR, TBN_STEP_MAX_POOL, TBN_STEP_MEAN, TBN_STEP_PLANES };

#define TBN_NONE SIZE_MAX

struct tbn_value {
    size_t channels; /* or features */
    size_t border;   /* of its bytes: the widest padding of those that read them */
    float scale;     /* it is kept as bytes of this scale, or 0 */
    int32_t floats;  /* whether it is kept as floats, channels innermost (those of TBN_STEP_PLANES: in planes) */
    size_t last;     /* the last step that reads it */
};

struct tbn_step {
    int32_t kind;
    int32_t relu;     /* of a convolution behind what is added, of a pooling behind its norm */
    int32_t on_bytes; /* whether it reads the bytes of its input, where that is not the kind's choice */
    float rounded;    /* of a convolution: its results are brought into int8 with this scale and back, or 0 */
    float added_scale; /* 0: floats are added */
    size_t input, output, added; /* values; `added` may be TBN_NONE */
    const struct tbn_bound *layer;
    const float *factors, *offsets; /* of a norm behind a pooling of floats, one for each channel; or NULL */
    size_t kernel[2], stride[2], padding[2]; /* of a pooling */
};

struct tbn_network {
    const void *self; /* its own address */
    const struct tbn_step *steps;
    size_t step_count;
    const struct tbn_value *values;
    size_t value_count;
    const struct tbn_dots *dots;
    int64_t dims, out_dims; /* of its input and its result: 2, or 4 for images */
};

/* Height and width of the result, or TBN_MISFIT. */
TBN_EXPORT int tbn_network_sizes(const struct tbn_network *network, size_t height, size_t width, size_t *sizes);

/* x [samples][channels][height][width], or with the channels innermost if `last`, or [samples][features] -> out. */
TBN_EXPORT int tbn_network(const struct tbn_network *network, const float *x, int last, float *out, size_t samples,
                           size_t height, size_t width, size_t threads);

/*
 * Attention of floats, by kernels that have it: query, key, value -> out, dense; returns TBN_OK or TBN_OUT_OF_MEMORY.
 */
TBN_EXPORT int tbn_attention(const struct tbn_kernels *kernels, const struct tbn_attention *job,
                             const struct tbn_vectors *query, const struct tbn_vectors *key,
                             const struct tbn_vectors *value, float *out, size_t threads);

/* Whether kernels have it. */
TBN_EXPORT int tbn_has_attention(const struct tbn_kernels *kernels);

/* The `dots` of kernels. */
TBN_EXPORT const struct tbn_dots *tbn_dots_of(const struct tbn_kernels *kernels);

/* Functions of libtorch; see torch_calls.c. Those that return an int return 0 if all went well. */
struct tbn_torch {
    int32_t (*library_init_impl)(const char *space, const char *key, const char *file, uint32_t line, void **library);
    int32_t (*library_impl)(void *library, const char *name, void (*kernel)(uint64_t *, uint64_t, uint64_t));
    void (*check)(bool holds, const char *function, const char *file, uint32_t line, const char *message);
    int32_t (*get_num_threads)(uint32_t *threads);
    int32_t (*get_data_ptr)(void *tensor, void **pointer);
    int32_t (*get_dim)(void *tensor, int64_t *dims);
    int32_t (*get_numel)(void *tensor, int64_t *numel);
    int32_t (*get_sizes)(void *tensor, int64_t **sizes);
    int32_t (*get_strides)(void *tensor, int64_t **strides);
    int32_t (*get_dtype)(void *tensor, int32_t *dtype);
    int32_t (*is_contiguous)(void *tensor, bool *contiguous);
    int32_t (*empty_strided)(int64_t dims, const int64_t *sizes, const int64_t *strides, int32_t dtype, int32_t device,
                             int32_t index, void **tensor);
    int32_t (*copy)(void *to, void *from, int32_t non_blocking);
    int32_t (*delete_tensor)(void *tensor);
};

/* What libtorch calls the fields of struct tbn_torch, in their order. */
#define TBN_TORCH_FUNCTIONS                                                                                      \
    "aoti_torch_library_init_impl", "aoti_torch_library_impl", "aoti_torch_check", "torch_get_num_threads",      \
        "aoti_torch_get_data_ptr", "aoti_torch_get_dim", "aoti_torch_get_numel", "aoti_torch_get_sizes",         \
        "aoti_torch_get_strides", "aoti_torch_get_dtype", "aoti_torch_is_contiguous", "aoti_torch_empty_strided", \
        "aoti_torch_copy_", "aoti_torch_delete_tensor_object"

/*
 * For a program without Python: defines the operators and registers their kernels, with functions of the libtorch that
 * the program has loaded. To be called once. Returns 0, 1 if libtorch has not all of them, or 2 if it refuses.
 */
TBN_EXPORT int tbn_define_operators(void);

/* The operators' schemas, ended by NULL. */
TBN_EXPORT const char *const *tbn_schemas(void);

enum tbn_plan_kind { TBN_LAYER_PLAN = 1, TBN_NETWORK_PLAN = 2 };

/*
 * The plan of this kind and of `root` bytes in a stored one of `size` bytes, which must stay where it is; NULL and the reason if it is
 * none, is damaged, or of another version or processor. See stored.c.
 */
const void *tbn_restore(const void *source, size_t size, size_t root, enum tbn_plan_kind kind, const char **why);

/* Registers the kernels below for the CPU; the operators are defined in Python. Returns 0, or 1 if libtorch refuses. */
TBN_EXPORT int tbn_register(const struct tbn_torch *functions);

TBN_EXPORT void tbn_call_linear(uint64_t *stack, uint64_t inputs, uint64_t outputs);
TBN_EXPORT void tbn_call_conv(uint64_t *stack, uint64_t inputs, uint64_t outputs);
TBN_EXPORT void tbn_call_dense(uint64_t *stack, uint64_t inputs, uint64_t outputs);
TBN_EXPORT void tbn_call_attention(uint64_t *stack, uint64_t inputs, uint64_t outputs);
TBN_EXPORT void tbn_call_masked_attention(uint64_t *stack, uint64_t inputs, uint64_t outputs);
TBN_EXPORT void tbn_call_network(uint64_t *stack, uint64_t inputs, uint64_t outputs);

/* Threads that wait for work, for tests. */
TBN_EXPORT size_t tbn_pool_threads(void);

#endif
