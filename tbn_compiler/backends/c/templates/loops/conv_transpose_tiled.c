/* {{ title }} in any layout, one weight at a time. */
static void {{ name }}_conv_transpose_{{ kind }}(const {{ name }}_tiled_conv_transpose *layer, const {{ name }}_tiled_weight *weight,
    const {{ name }}_window *window, const {{ element }} *tile, const float *x, float *y)
{
    const size_t outputs = layer->out_channels / layer->groups;

    {{ name }}_conv_transpose_start(window, layer->bias, layer->out_channels, y);
    for (size_t channel = 0; channel < layer->in_channels; ++channel) {
        const size_t first = channel / (layer->in_channels / layer->groups) * outputs; /* output channel of the group */
        const float *const image = x + channel * window->output_height * window->output_width;
        const float alpha = layer->alpha != NULL ? layer->alpha[channel / layer->rows_per_alpha] : 1.0f;

        for (size_t i = 0; i < weight->row_size; ++i) {
            float *const result = y + (first + i / weight->kernel_size) * window->input_height * window->input_width;
            float scale;
            const size_t t = {{ name }}_tiled_position(weight, channel, i, &scale);

            scale *= alpha;
            {{ name }}_conv_transpose_spread(window, i % weight->kernel_size, {{ product }}, image, result);
        }
    }
}
