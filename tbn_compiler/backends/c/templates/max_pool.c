{# needs: window, window_inside #}
{# headers: math.h #}
/* The largest of some rows and columns of an image; NaN if there is one. */
static float {{ name }}_max_pool_window(const float *x, size_t rows, size_t row_step, size_t columns, size_t column_step)
{
    float largest = -INFINITY;

    for (; rows != 0; --rows, x += row_step) {
        const float *pixel = x;

        for (size_t count = columns; count != 0; --count, pixel += column_step) {
            if (!(*pixel <= largest)) {
                largest = *pixel;
                if (largest != largest) {
                    return largest;
                }
            }
        }
    }
    return largest;
}

/* The largest element under the window at each position; the padding never is. */
static void {{ name }}_max_pool(const {{ name }}_window *window, size_t planes, const float *x, float *y)
{
    const size_t width = window->input_width;

    for (; planes != 0; --planes, x += window->input_height * width) {
        for (size_t row = 0; row < window->output_height; ++row) {
            const size_t top = row * window->stride_height - window->padding_height;
            size_t i;
            const size_t rows = {{ name }}_window_inside(top, window->kernel_height, window->dilation_height,
                window->input_height, &i);
            const float *const line = rows != 0 ? x + (top + i * window->dilation_height) * width : x;

            for (size_t column = 0; column < window->output_width; ++column) {
                const size_t left = column * window->stride_width - window->padding_width;
                size_t j;
                const size_t columns =
                    {{ name }}_window_inside(left, window->kernel_width, window->dilation_width, width, &j);

                *y++ = {{ name }}_max_pool_window(columns != 0 ? line + left + j * window->dilation_width : line, rows,
                    window->dilation_height * width, columns, window->dilation_width);
            }
        }
    }
}
