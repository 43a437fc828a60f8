{# needs: activate, tiled_linear #}
/* Store one unique row's product in every row of y that repeats it, with that row's alpha. */
static void {{ name }}_tiled_linear_store(const {{ name }}_tiled_linear *layer, size_t row, float product, float *y)
{
    for (size_t r = row; r < layer->out_features; r += layer->unique_rows) {
        const float value = layer->alpha != NULL ? layer->alpha[r / layer->rows_per_alpha] * product : product;
        y[r] = {{ name }}_activate(layer->bias != NULL ? value + layer->bias[r] : value, layer->relu);
    }
}
