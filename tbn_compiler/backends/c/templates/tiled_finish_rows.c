{# needs: activate #}
/*
 * What follows the products of a layer whose groups have rows of their own: for each output the scale, the bias and the
 * activation. Output r of a group is its row r % rows, scaled.
 */
typedef struct {
    size_t groups;
    size_t outputs;   /* of each group */
    size_t rows;      /* of each group */
    size_t stride;    /* from the products of a group to those of the next one */
    size_t positions; /* of each channel; 1 for features */
    size_t outputs_per_alpha;
    const float *alpha; /* NULL: not scaled */
    const float *bias;  /* of each output, or NULL */
    int relu;
} {{ name }}_tiled_finish_rows_layer;

/* y may be products, if there are one group and one position, and as many rows as outputs. */
static void {{ name }}_tiled_finish_rows(const {{ name }}_tiled_finish_rows_layer *layer, const float *products,
    size_t position, float *y)
{
    const float *alpha = layer->alpha;
    const float *bias = layer->bias;
    float scale = alpha != NULL ? *alpha : 1.0f;
    size_t left = layer->outputs_per_alpha; /* outputs that have this scale */

    y += position / layer->positions * layer->positions * layer->groups * layer->outputs + position % layer->positions;
    for (size_t group = 0; group < layer->groups; ++group, products += layer->stride) {
        size_t row = 0;

        for (size_t count = layer->outputs; count != 0; --count, --left) {
            if (left == 0) {
                left = layer->outputs_per_alpha;
                scale = *++alpha;
            }
            *y = {{ name }}_activate(products[row] * scale + (bias != NULL ? *bias++ : 0.0f), layer->relu);
            y += layer->positions;
            row = row + 1 == layer->rows ? 0 : row + 1;
        }
    }
}
