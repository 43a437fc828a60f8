/* Store one unique row's product in every row of y that repeats it, with that copy's alpha. */
static void {{ name }}_tiled_linear_store(const {{ name }}_tiled_linear *layer, size_t row, float product, float *y)
{
    const float *alpha = layer->alpha;

    for (size_t r = row; r < layer->out_features; r += layer->unique_rows) {
        const float value = *alpha * product;
        y[r] = {{ name }}_activate(layer->bias != NULL ? value + layer->bias[r] : value, layer->relu);
        alpha += layer->alpha_stride;
    }
}
