{# needs: activate #}
{# headers: float.h, stdint.h #}
/* What follows the products of a layer whose outputs are sums of several of them. */
typedef struct {
    size_t outputs;          /* features or channels */
    size_t positions;        /* of each channel; 1 for features */
    size_t terms;            /* products of an output */
    const uint16_t *product; /* numbers of the products, by output */
    const float *factor;     /* what each is multiplied with */
    /* Where the scale changes inside a row, further products correct the sum. */
    size_t corrections;
    const uint16_t *corrected; /* by correction: number of the output, in order */
    const uint16_t *correcting_product;
    const float *correcting_factor;
    const float *bias; /* of each output, or NULL */
    int relu;
} {{ name }}_tiled_combine_layer;

static void {{ name }}_tiled_combine(const {{ name }}_tiled_combine_layer *layer, const float *products, size_t position,
    float *y)
{
    const uint16_t *product = layer->product;
    const float *factor = layer->factor;
    size_t correction = 0;

    y += position / layer->positions * layer->positions * layer->outputs + position % layer->positions;
    for (size_t output = 0; output < layer->outputs; ++output, y += layer->positions) {
        float value = 0.0f;
        float sum;

        for (size_t term = layer->terms; term != 0; --term) {
            value += *factor++ * products[*product++];
        }
        sum = value;
        for (; correction < layer->corrections && layer->corrected[correction] == output; ++correction) {
            sum += layer->correcting_factor[correction] * products[layer->correcting_product[correction]];
        }
        /* Corrections have other signs: they would turn infinity into NaN. */
        if (value >= -FLT_MAX && value <= FLT_MAX) {
            value = sum;
        }
        *y = {{ name }}_activate(layer->bias != NULL ? value + layer->bias[output] : value, layer->relu);
    }
}
