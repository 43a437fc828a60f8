{# needs: window, tiled_transpose_layer #}
/* The channels of one pixel, scaled, those with equal signs summed. position counts through all samples. */
static void {{ name }}_tiled_transpose_sums(const {{ name }}_tiled_transpose_layer *layer, const {{ name }}_window *window,
    const float *x, size_t position, float *sums)
{
    const size_t size = window->output_height * window->output_width;
    const float *alpha = layer->alpha;
    float scale = alpha != NULL ? *alpha : 1.0f;
    size_t left = layer->inputs_per_alpha; /* channels that have this scale */

    x += position / size * size * layer->groups * layer->inputs + position % size;
    for (size_t group = 0; group < layer->groups; ++group, sums += layer->unique_inputs) {
        size_t unique = 0;

        for (size_t channel = 0; channel < layer->inputs; ++channel, x += size, --left) {
            if (left == 0) {
                left = layer->inputs_per_alpha;
                scale = *++alpha;
            }
            sums[unique] = channel < layer->unique_inputs ? scale * *x : sums[unique] + scale * *x;
            unique = unique + 1 == layer->unique_inputs ? 0 : unique + 1;
        }
    }
}
