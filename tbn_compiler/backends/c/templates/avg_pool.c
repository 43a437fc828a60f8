{# needs: window #}
/*
 * The mean of the elements under the window at each position. With include_padding the padding counts as zeros; a
 * divisor that is not 0 replaces the number of elements.
 */
static void {{ name }}_avg_pool(const {{ name }}_window *window, size_t planes, int include_padding, size_t divisor,
    const float *x, float *y)
{
    const size_t height = window->input_height + 2 * window->padding_height;
    const size_t width = window->input_width + 2 * window->padding_width;

    for (size_t plane = 0; plane < planes; ++plane) {
        for (size_t row = 0; row < window->output_height; ++row) {
            for (size_t column = 0; column < window->output_width; ++column) {
                float sum = 0.0f;
                size_t inside = 0; /* elements of the image */
                size_t padded = 0; /* elements of the image and its padding */

                for (size_t i = 0; i < window->kernel_height; ++i) {
                    for (size_t j = 0; j < window->kernel_width; ++j) {
                        const size_t r = row * window->stride_height + i;
                        const size_t c = column * window->stride_width + j;
                        /* What is before the image wraps to a large number. */
                        const size_t image_row = r - window->padding_height;
                        const size_t image_column = c - window->padding_width;

                        padded += (r < height && c < width) ? 1u : 0u;
                        if (image_row < window->input_height && image_column < window->input_width) {
                            sum += x[image_row * window->input_width + image_column];
                            ++inside;
                        }
                    }
                }
                *y++ = sum / (float)(divisor != 0 ? divisor : include_padding ? padded : inside);
            }
        }
        x += window->input_height * window->input_width;
    }
}
