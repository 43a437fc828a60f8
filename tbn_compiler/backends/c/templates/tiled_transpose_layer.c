/* A transpose convolution, pixel by pixel of its input. Rows of the weight are input channels. */
typedef struct {
    size_t groups;
    size_t inputs;        /* channels of each group */
    size_t unique_inputs; /* of each group: the signs of channel c are those of channel c % unique_inputs */
    size_t outputs;       /* channels of each group */
    size_t stride;        /* from the products of a group to those of the next one */
    size_t inputs_per_alpha;
    const float *alpha; /* NULL: not scaled */
} {{ name }}_tiled_transpose_layer;
