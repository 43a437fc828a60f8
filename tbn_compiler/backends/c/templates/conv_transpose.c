{# needs: conv_transpose_start, conv_transpose_spread #}
/* weight [in_channels x out_channels / groups x kernel], bias of out_channels elements or NULL. */
static void {{ name }}_conv_transpose(const {{ name }}_window *window, size_t in_channels, size_t out_channels, size_t groups,
    const float *weight, const float *bias, const float *x, float *y)
{
    const size_t kernel_size = window->kernel_height * window->kernel_width;
    const size_t outputs = out_channels / groups;

    {{ name }}_conv_transpose_start(window, bias, out_channels, y);
    for (size_t channel = 0; channel < in_channels; ++channel) {
        const size_t first = channel / (in_channels / groups) * outputs; /* output channel of the group */
        const float *const image = x + channel * window->output_height * window->output_width;

        for (size_t i = 0; i < outputs * kernel_size; ++i) {
            float *const result = y + (first + i / kernel_size) * window->input_height * window->input_width;
            {{ name }}_conv_transpose_spread(window, i % kernel_size, *weight++, image, result);
        }
    }
}
