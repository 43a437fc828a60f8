{# Parameters: kernel; whole and part, what computes the middle of a column with all columns of the window and with some. #}
/* One filter at the output positions of some columns, from first on and before end. */
static void {{ name }}_{{ kernel }}(const {{ name }}_window *window, const {{ name }}_conv_layer *layer, {{ name }}_conv_part *part,
    size_t first, size_t end, const float *weight, const float *bias, const float *x, float *y)
{
    const size_t width = window->input_width;
    const int flat = window->kernel_height == 1;

    part->position_step = window->stride_height * width;
    part->result_step = window->output_width;
    for (size_t column = first; column < end; ++column) {
        const size_t left = column * window->stride_width - window->padding_width;
        size_t j;
        const size_t columns =
            {{ name }}_window_inside(left, window->kernel_width, window->dilation_width, width, &j);
        const float *const pixel = columns != 0 ? x + left + j * window->dilation_width : x;

        part->columns = columns;
        part->skipped_columns = window->kernel_width - columns;
        for (size_t row = 0; row < window->output_height;) {
            const size_t top = row * window->stride_height - window->padding_height;
            float *const result = y + row * window->output_width + column;
            size_t i;
            const size_t rows = {{ name }}_window_inside(top, window->kernel_height, window->dilation_height,
                window->input_height, &i);
            const float *const w = weight + i * window->kernel_width + j;
            const float *const line = rows != 0 ? pixel + (top + i * window->dilation_height) * width : pixel;

            part->channels = flat ? rows : layer->inputs;
            part->rows = flat ? layer->inputs : rows;
            part->skipped_rows = (window->kernel_height - rows) * window->kernel_width;
            if (row != layer->first_row || row == layer->end_row) {
                {{ name }}_conv_edge_by_1(part, w, bias, line, result);
                ++row;
                continue;
            }
{% if whole == part %}
            {{ name }}_{{ part }}(part, w, bias, line, result, layer->end_row - row);
{% else %}
            if (columns == window->kernel_width) {
                {{ name }}_{{ whole }}(part, w, bias, line, result, layer->end_row - row);
            } else {
                {{ name }}_{{ part }}(part, w, bias, line, result, layer->end_row - row);
            }
{% endif %}
            row = layer->end_row;
        }
    }
}
