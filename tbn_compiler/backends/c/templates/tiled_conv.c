{# needs: activate, window #}
/* A convolution whose filters are rows of a weight made of copies of one tile. */
typedef struct {
    size_t in_channels; /* of x */
    size_t out_channels;
    size_t groups;
    size_t unique_rows;    /* rows to compute in each group; its row r has the signs of its row r % unique_rows */
    size_t rows_per_alpha; /* channel r has alpha[r / rows_per_alpha] */
    const float *alpha;    /* NULL: 1 for every channel */
    const float *bias;     /* out_channels elements, or NULL */
    int relu;
} {{ name }}_tiled_conv;

/* Store a unique row's product at one position of every channel of its group that repeats it. */
static void {{ name }}_tiled_conv_store(const {{ name }}_tiled_conv *layer, size_t group, size_t row, float product,
    size_t position, size_t output_size, float *y)
{
    const size_t channels = layer->out_channels / layer->groups;

    for (size_t r = group * channels + row; r < (group + 1) * channels; r += layer->unique_rows) {
        const float value = layer->alpha != NULL ? layer->alpha[r / layer->rows_per_alpha] * product : product;
        y[r * output_size + position] = {{ name }}_activate(layer->bias != NULL ? value + layer->bias[r] : value, layer->relu);
    }
}
