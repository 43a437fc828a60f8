{# needs: activate, window, window_inside #}
/* weight [out_channels x in_channels / groups x kernel], bias of out_channels elements or NULL. */
static void {{ name }}_conv(const {{ name }}_window *window, size_t in_channels, size_t out_channels, size_t groups, int relu,
    const float *weight, const float *bias, const float *x, float *y)
{
    const size_t width = window->input_width;
    const size_t kernel_size = window->kernel_height * window->kernel_width;
    const size_t inputs = in_channels / groups;

    for (size_t channel = 0; channel < out_channels; ++channel) {
        const float *const image = x + channel / (out_channels / groups) * inputs * window->input_height * width;

        for (size_t row = 0; row < window->output_height; ++row) {
            const size_t top = row * window->stride_height - window->padding_height;
            size_t first_row;
            const size_t rows = {{ name }}_window_inside(top, window->kernel_height, window->dilation_height,
                window->input_height, &first_row);

            for (size_t column = 0; column < window->output_width; ++column) {
                const size_t left = column * window->stride_width - window->padding_width;
                size_t first_column;
                const size_t columns =
                    {{ name }}_window_inside(left, window->kernel_width, window->dilation_width, width, &first_column);
                const float *w = weight + first_row * window->kernel_width + first_column;
                /* The pixel under the first weight that is inside the image. */
                size_t pixel = (top + first_row * window->dilation_height) * width + left
                    + first_column * window->dilation_width;
                float value = bias != NULL ? bias[channel] : 0.0f;

                for (size_t k = 0; k < inputs; ++k) {
                    for (size_t i = 0; i < rows; ++i) {
                        for (size_t j = 0; j < columns; ++j) {
                            value += w[i * window->kernel_width + j]
                                * image[pixel + i * window->dilation_height * width + j * window->dilation_width];
                        }
                    }
                    w += kernel_size;
                    pixel += window->input_height * width;
                }
                *y++ = {{ name }}_activate(value, relu);
            }
        }
        weight += inputs * kernel_size;
    }
}
