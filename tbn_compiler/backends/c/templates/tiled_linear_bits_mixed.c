/*
 * Copies of the tile end inside rows, each with its own alpha, so that no row repeats another: sum up to the end
 * of a copy, scale by its alpha, and go on with the next copy.
 */
static void {{ name }}_tiled_linear_bits_mixed(const {{ name }}_tiled_linear *layer, const uint8_t *tile, const float *x, float *y)
{
    const float *alpha = layer->alpha;
    size_t t = 0;

    for (size_t row = 0; row < layer->out_features; ++row) {
        float value = 0.0f;
        float product = 0.0f;
        for (size_t j = 0; j < layer->in_features; ++j) {
            product += ((unsigned)tile[t / 8] >> (t % 8) & 1u) ? x[j] : -x[j];
            if (++t == layer->tile_size) {
                value += *alpha++ * product;
                product = 0.0f;
                t = 0;
            }
        }
        if (t != 0) { /* else the row ended with a copy; after the last row no alpha is left */
            value += *alpha * product;
        }
        y[row] = {{ name }}_activate(layer->bias != NULL ? value + layer->bias[row] : value, layer->relu);
    }
}
