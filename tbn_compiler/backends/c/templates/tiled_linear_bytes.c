{# needs: tiled_linear_store #}
/*
 * Rows of whole bytes: eight inputs for each byte of the tile. The unique rows follow one another in the repeated
 * tile, so one pointer runs through all of them and starts again at the end of the tile.
 */
static void {{ name }}_tiled_linear_bytes(const {{ name }}_tiled_linear *layer, const uint8_t *tile, const float *x, float *y)
{
    const uint8_t *const end = tile + layer->tile_size / 8;
    const uint8_t *next = tile;

    for (size_t row = 0; row < layer->unique_rows; ++row) {
        float product = 0.0f;
        for (size_t j = 0; j < layer->in_features; j += 8) {
            const unsigned bits = *next;
            const float low = ((bits & 0x01u) ? x[j] : -x[j]) + ((bits & 0x02u) ? x[j + 1] : -x[j + 1])
                + ((bits & 0x04u) ? x[j + 2] : -x[j + 2]) + ((bits & 0x08u) ? x[j + 3] : -x[j + 3]);
            const float high = ((bits & 0x10u) ? x[j + 4] : -x[j + 4]) + ((bits & 0x20u) ? x[j + 5] : -x[j + 5])
                + ((bits & 0x40u) ? x[j + 6] : -x[j + 6]) + ((bits & 0x80u) ? x[j + 7] : -x[j + 7]);
            product += low + high;
            if (++next == end) {
                next = tile;
            }
        }
        {{ name }}_tiled_linear_store(layer, row, product, y);
    }
}
