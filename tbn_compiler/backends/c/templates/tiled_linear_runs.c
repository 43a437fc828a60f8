/*
 * {{ "A full-precision tile in any layout." if kind == "float" else "Any layout and row length." }}
 * Each tile element serves a group of p_in neighbouring inputs: a row takes the first inputs of all groups, then the
 * second ones, and so on. Each pass goes run by run: in a run, tile elements follow one another and no scale changes.
 * Products of two sizes stay below the number of weights, which has to fit size_t.
 */
static void {{ name }}_tiled_linear_{{ kind }}(const {{ name }}_tiled_linear *layer, const {{ name }}_tiled_runs *runs,
    const {{ element }} *tile, const float *x, float *y)
{
    const size_t row_size = layer->in_features / runs->p_in;
    const size_t tile_size = layer->tile_size;

    for (size_t row = 0; row < layer->unique_rows; ++row) {
        float value = 0.0f;
        for (size_t neighbour = 0; neighbour < runs->p_in; ++neighbour) {
            size_t copy = row * row_size / tile_size;
            size_t j = row * row_size % tile_size; /* element of the copy before it is rolled */
            size_t replica = 0;
            size_t i = neighbour; /* element of x */
            size_t count;

            for (size_t done = 0; done < row_size; done += count) {
                const size_t t = (j + tile_size - copy * runs->shift % tile_size) % tile_size;
                float scale = runs->copy_alpha != NULL ? runs->copy_alpha[copy * runs->p_in + neighbour] : 1.0f;

                while (i >= runs->input_size) {
                    i -= runs->input_size;
                    ++replica;
                }
                if (runs->input_alpha != NULL) {
                    scale *= runs->input_alpha[replica];
                }
                /* A run ends with the row, the copy, the tile or the replica, whichever comes first. */
                count = row_size - done;
                count = count < tile_size - j ? count : tile_size - j;
                count = count < tile_size - t ? count : tile_size - t;
                if (i + (count - 1) * runs->p_in >= runs->input_size) {
                    count = (runs->input_size - i - 1) / runs->p_in + 1;
                }
                value += scale * {{ name }}_{{ kind }}_product(tile, t, x + i, runs->p_in, count);

                i += count * runs->p_in;
                j += count;
                if (j == tile_size) {
                    j = 0;
                    ++copy;
                }
            }
        }
        {{ name }}_tiled_linear_store(layer, row, value, y);
    }
}
