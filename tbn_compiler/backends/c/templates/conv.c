{# needs: activate, window #}
/* weight [out_channels x in_channels / groups x kernel], bias of out_channels elements or NULL. */
static void {{ name }}_conv(const {{ name }}_window *window, size_t in_channels, size_t out_channels, size_t groups, int relu,
    const float *weight, const float *bias, const float *x, float *y)
{
    const size_t input_size = window->input_height * window->input_width;
    const size_t inputs = in_channels / groups;

    for (size_t channel = 0; channel < out_channels; ++channel) {
        const float *const image = x + channel / (out_channels / groups) * inputs * input_size;

        for (size_t row = 0; row < window->output_height; ++row) {
            for (size_t column = 0; column < window->output_width; ++column) {
                const float *w = weight;
                float value = bias != NULL ? bias[channel] : 0.0f;

                for (size_t k = 0; k < inputs; ++k) {
                    for (size_t i = 0; i < window->kernel_height; ++i) {
                        /* What is before the image wraps to a large number. */
                        const size_t r = row * window->stride_height + i * window->dilation_height - window->padding_height;
                        for (size_t j = 0; j < window->kernel_width; ++j, ++w) {
                            const size_t c = column * window->stride_width + j * window->dilation_width - window->padding_width;
                            if (r < window->input_height && c < window->input_width) {
                                value += *w * image[k * input_size + r * window->input_width + c];
                            }
                        }
                    }
                }
                *y++ = {{ name }}_activate(value, relu);
            }
        }
        weight += inputs * window->kernel_height * window->kernel_width;
    }
}
