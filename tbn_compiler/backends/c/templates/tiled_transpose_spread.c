{# needs: window, tiled_transpose_layer #}
/*
 * Adds the products of one pixel to the image: those of a group follow one another by place in the window, and there by
 * output channel. The window slides over y.
 */
static void {{ name }}_tiled_transpose_spread(const {{ name }}_tiled_transpose_layer *layer, const {{ name }}_window *window,
    const float *products, size_t position, float *y)
{
    const size_t positions = window->output_height * window->output_width;
    const size_t size = window->input_height * window->input_width;
    /* What is before the image wraps to a large number. */
    const size_t top = position % positions / window->output_width * window->stride_height - window->padding_height;
    const size_t left = position % window->output_width * window->stride_width - window->padding_width;

    y += position / positions * layer->groups * layer->outputs * size;
    for (size_t group = 0; group < layer->groups; ++group, y += layer->outputs * size, products += layer->stride) {
        const float *product = products;

        for (size_t i = 0, row = top; i < window->kernel_height; ++i, row += window->dilation_height) {
            for (size_t j = 0, column = left; j < window->kernel_width; ++j, column += window->dilation_width) {
                if (row < window->input_height && column < window->input_width) {
                    float *pixel = y + row * window->input_width + column;

                    for (size_t channel = 0; channel < layer->outputs; ++channel, pixel += size) {
                        *pixel += product[channel];
                    }
                }
                product += layer->outputs;
            }
        }
    }
}
