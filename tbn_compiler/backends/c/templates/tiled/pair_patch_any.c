{# Parameters: kernel. #}
/*
 * The inputs of two neighbouring output positions of a convolution in the order of a filter, as x0 + 65536 * x1. pair
 * counts them through all lines of all samples, of all_channels each; in a line of odd length the last position has a
 * neighbour that is none, and whose results are not kept.
 */
static void {{ name }}_{{ kernel }}(const {{ name }}_window *window, size_t channels, size_t all_channels, const int8_t *x, size_t pair,
    int32_t *patch)
{
    const size_t pairs = (window->output_width + 1) / 2;
    const size_t line = pair / pairs;
    const size_t height = window->input_height;
    const size_t width = window->input_width;
    /* Where the first window starts. Left of or above the image the subtraction wraps around, to beyond the last element. */
    const size_t top = line % window->output_height * window->stride_height - window->padding_height;
    const size_t left = pair % pairs * 2 * window->stride_width - window->padding_width;

    x += line / window->output_height * all_channels * height * width;
    for (; channels != 0; --channels, x += height * width) {
        size_t row = top;

        for (size_t i = 0; i < window->kernel_height; ++i, row += window->dilation_height) {
            size_t column = left;

            for (size_t j = 0; j < window->kernel_width; ++j, column += window->dilation_width) {
                const size_t second = column + window->stride_width;
                int32_t both = 0;

                if (row < height && column < width) {
                    both = x[row * width + column];
                }
                if (row < height && second < width) {
                    both += x[row * width + second] * 65536;
                }
                *patch++ = both;
            }
        }
    }
}
