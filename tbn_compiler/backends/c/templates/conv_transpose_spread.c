{# needs: window #}
/* Adds one input channel times one weight to an output channel: pixel i lies under the window's element at i. */
static void {{ name }}_conv_transpose_spread(const {{ name }}_window *window, size_t element, float weight, const float *x, float *y)
{
    const size_t down = element / window->kernel_width * window->dilation_height;
    const size_t right = element % window->kernel_width * window->dilation_width;

    for (size_t row = 0; row < window->output_height; ++row) {
        for (size_t column = 0; column < window->output_width; ++column, ++x) {
            /* The window slides over y; what is before it wraps to a large number. */
            const size_t r = row * window->stride_height + down - window->padding_height;
            const size_t c = column * window->stride_width + right - window->padding_width;
            if (r < window->input_height && c < window->input_width) {
                y[r * window->input_width + c] += weight * *x;
            }
        }
    }
}
