{# headers: math.h, stdint.h #}
/* A convolution whose filters slide over padded images, for groups of few input channels. */
typedef struct {
    size_t groups;
    size_t channels; /* of the input of each group */
    size_t outputs;  /* channels of each group */
    size_t plane_height; /* of a padded image */
    size_t plane_width;
    size_t elements;    /* of a filter */
    size_t unique_rows; /* output channel r has filter r % unique_rows */
    size_t outputs_per_alpha;
    const float *alpha; /* NULL: not scaled */
    const float *bias;  /* of each output channel, or NULL */
    float lowest;       /* smaller results become this: 0 for a ReLU */
} {{ name }}_tiled_filter_layer;

/* Whether element i of a filter is +1: bit i % 8 of byte i / 8 of the filters one behind the other. */
static int {{ name }}_tiled_filter_sign(const uint8_t *signs, size_t i)
{
    return (signs[i / 8] >> (i % 8) & 1) != 0;
}
