{# Parameters: kernel; block, what computes the middle of a row. #}
/*
 * 4 filters at a time; a group's last ones are its last 4, some of them once more. weight [groups x outputs x inputs x kernel],
 * bias of as many elements as there are filters, or NULL.
 */
static void {{ name }}_{{ kernel }}(const {{ name }}_window *window, const {{ name }}_conv_layer *layer, const float *weight,
    const float *bias, const float *x, float *y)
{
    const size_t height = window->input_height;
    const size_t width = window->input_width;
    const int flat = window->kernel_height == 1;
    {{ name }}_conv_part part = {{ name }}_conv_start(window, layer);

    for (size_t next = 0; next < layer->groups * layer->outputs;) {
        const size_t group = next / layer->outputs;
        const size_t last = (group + 1) * layer->outputs - 4;
        const size_t filter = next < last ? next : last;
        const float *const image = x + group * layer->inputs * part.channel_step;
        const float *const first_bias = bias != NULL ? bias + filter : NULL;
        float *result = y + filter * part.output_size;

        for (size_t row = 0; row < window->output_height; ++row) {
            const size_t top = row * window->stride_height - window->padding_height;
            size_t i;
            const size_t rows =
                {{ name }}_window_inside(top, window->kernel_height, window->dilation_height, height, &i);
            const float *const line = rows != 0 ? image + (top + i * window->dilation_height) * width : image;
            const float *const w = weight + filter * part.filter_size + i * window->kernel_width;

            part.channels = flat ? rows : layer->inputs;
            part.rows = flat ? layer->inputs : rows;
            part.skipped_rows = (window->kernel_height - rows) * window->kernel_width;
            for (size_t column = 0; column < window->output_width;) {
                const size_t left = column * window->stride_width - window->padding_width;
                size_t j;

                part.columns =
                    {{ name }}_window_inside(left, window->kernel_width, window->dilation_width, width, &j);
                part.skipped_columns = window->kernel_width - part.columns;
                if (column == layer->first_column && column < layer->end_column) {
                    {{ name }}_{{ block }}(&part, w, first_bias, line + left, result + column,
                        layer->end_column - column);
                    column = layer->end_column;
                } else {
                    const size_t pixel = part.columns != 0 ? left + j * window->dilation_width : 0;

                    {{ name }}_conv_edge_by_4(&part, w + j, first_bias, line + pixel, result + column);
                    ++column;
                }
            }
            result += window->output_width;
        }
        next = filter + 4;
    }
}
