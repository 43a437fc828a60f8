{# needs: window #}
/*
 * The inputs of one output position of a convolution, in the order of a filter: for each channel the elements of the
 * window. position counts through all samples.
 */
static void {{ name }}_tiled_patch(const {{ name }}_window *window, size_t channels, const float *x, size_t position,
    float *patch)
{
    const size_t place = position % (window->output_height * window->output_width);
    const size_t sample = position / (window->output_height * window->output_width);
    const size_t height = window->input_height;
    const size_t width = window->input_width;
    /* Where the window starts. Left of or above the image the subtraction wraps around, to beyond the last element. */
    const size_t top = place / window->output_width * window->stride_height - window->padding_height;
    const size_t left = place % window->output_width * window->stride_width - window->padding_width;

    x += sample * channels * height * width;
    for (; channels != 0; --channels, x += height * width) {
        size_t row = top;

        for (size_t i = 0; i < window->kernel_height; ++i, row += window->dilation_height) {
            size_t column = left;

            for (size_t j = 0; j < window->kernel_width; ++j, column += window->dilation_width) {
                *patch++ = row < height && column < width ? x[row * width + column] : 0.0f;
            }
        }
    }
}
