{# needs: activate #}
/*
 * What follows the products of a layer's different rows: sums over scaled copies of the input, and for each output the
 * scale, the bias and the activation. An output feature or channel repeats row (its number % rows).
 */
typedef struct {
    size_t rows;
    size_t copies;    /* scaled copies of the input; the products of a row stand side by side */
    size_t outputs;   /* features or channels */
    size_t positions; /* of each channel; 1 for features */
    /* Repeat c of row r is scaled by alpha[r * alpha_per_row + c * alpha_per_repeat]. */
    size_t alpha_per_row;
    size_t alpha_per_repeat;
    const float *input_alpha; /* scales of the copies of the input; NULL: one copy, not scaled */
    const float *alpha;       /* NULL: not scaled */
    const float *bias;        /* of each output, or NULL */
    int relu;
} {{ name }}_tiled_finish_layer;

/* y may be products, if there is one copy of the input and one position. */
static void {{ name }}_tiled_finish(const {{ name }}_tiled_finish_layer *layer, const float *products, size_t position,
    float *y)
{
    y += position / layer->positions * layer->positions * layer->outputs + position % layer->positions;
    for (size_t row = 0; row < layer->rows; ++row) {
        const float *alpha = layer->alpha;
        float product = 0.0f;

        if (layer->input_alpha != NULL) {
            for (size_t copy = 0; copy < layer->copies; ++copy) {
                product += layer->input_alpha[copy] * *products++;
            }
        } else {
            product = *products++;
        }
        if (alpha != NULL) {
            alpha += row * layer->alpha_per_row;
        }
        for (size_t output = row; output < layer->outputs; output += layer->rows) {
            float value = product;

            if (alpha != NULL) {
                value *= *alpha;
                alpha += layer->alpha_per_repeat;
            }
            if (layer->bias != NULL) {
                value += layer->bias[output];
            }
            y[output * layer->positions] = {{ name }}_activate(value, layer->relu);
        }
    }
}
