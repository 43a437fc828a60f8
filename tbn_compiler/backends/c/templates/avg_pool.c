{# needs: window, window_inside #}
/* How many elements of a side of a window, which starts at start, lie before end. */
static size_t {{ name }}_avg_pool_side(size_t start, size_t kernel, size_t end)
{
    return start >= end ? 0 : end - start < kernel ? end - start : kernel;
}

/*
 * The mean of the elements under the window at each position. With include_padding the padding counts as zeros; a
 * divisor that is not 0 replaces the number of elements.
 */
static void {{ name }}_avg_pool(const {{ name }}_window *window, size_t planes, int include_padding, size_t divisor,
    const float *x, float *y)
{
    const size_t height = window->input_height;
    const size_t width = window->input_width;

    for (; planes != 0; --planes, x += height * width) {
        for (size_t row = 0; row < window->output_height; ++row) {
            const size_t top = row * window->stride_height;
            const size_t padded_rows =
                {{ name }}_avg_pool_side(top, window->kernel_height, height + 2 * window->padding_height);
            size_t i;
            const size_t rows =
                {{ name }}_window_inside(top - window->padding_height, window->kernel_height, 1, height, &i);
            const float *const line = rows != 0 ? x + (top - window->padding_height + i) * width : x;

            for (size_t column = 0; column < window->output_width; ++column) {
                const size_t left = column * window->stride_width;
                size_t j;
                const size_t columns =
                    {{ name }}_window_inside(left - window->padding_width, window->kernel_width, 1, width, &j);
                const float *pixel = columns != 0 ? line + (left - window->padding_width + j) : line;
                size_t elements = divisor;
                float sum = 0.0f;

                if (divisor == 0 && include_padding) {
                    elements = padded_rows
                        * {{ name }}_avg_pool_side(left, window->kernel_width, width + 2 * window->padding_width);
                } else if (divisor == 0) {
                    elements = rows * columns;
                }
                for (size_t r = rows; r != 0; --r, pixel += width) {
                    for (size_t c = 0; c < columns; ++c) {
                        sum += pixel[c];
                    }
                }
                *y++ = sum / (float)elements;
            }
        }
    }
}
