/* Any row length: one bit for each input. The tile position t runs through all unique rows, modulo the tile size. */
static void {{ name }}_tiled_linear_bits(const {{ name }}_tiled_linear *layer, const uint8_t *tile, const float *x, float *y)
{
    size_t t = 0;

    for (size_t row = 0; row < layer->unique_rows; ++row) {
        float product = 0.0f;
        for (size_t j = 0; j < layer->in_features; ++j) {
            product += ((unsigned)tile[t / 8] >> (t % 8) & 1u) ? x[j] : -x[j];
            if (++t == layer->tile_size) {
                t = 0;
            }
        }
        {{ name }}_tiled_linear_store(layer, row, product, y);
    }
}
