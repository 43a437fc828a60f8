{# needs: window #}
{# headers: stdint.h #}
/* The largest element under the window at each position; the padding never is. */
static void {{ name }}_max_pool_int8(const {{ name }}_window *window, size_t planes, const int8_t *x, int8_t *y)
{
    for (size_t plane = 0; plane < planes; ++plane) {
        for (size_t row = 0; row < window->output_height; ++row) {
            for (size_t column = 0; column < window->output_width; ++column) {
                int8_t largest = -128;

                for (size_t i = 0; i < window->kernel_height; ++i) {
                    /* Rows and columns count from the padding on; what is before the image wraps to a large number. */
                    const size_t r = row * window->stride_height + i * window->dilation_height - window->padding_height;
                    for (size_t j = 0; r < window->input_height && j < window->kernel_width; ++j) {
                        const size_t c = column * window->stride_width + j * window->dilation_width - window->padding_width;
                        if (c < window->input_width && x[r * window->input_width + c] > largest) {
                            largest = x[r * window->input_width + c];
                        }
                    }
                }
                *y++ = largest;
            }
        }
        x += window->input_height * window->input_width;
    }
}
