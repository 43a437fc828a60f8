/* A transpose convolution; rows of its weight, which is made of copies of one tile, are input channels. */
typedef struct {
    size_t in_channels;
    size_t out_channels;
    size_t groups;
    size_t rows_per_alpha; /* input channel r has alpha[r / rows_per_alpha] */
    const float *alpha;    /* NULL: 1 for every channel */
    const float *bias;     /* out_channels elements, or NULL */
} {{ name }}_tiled_conv_transpose;
