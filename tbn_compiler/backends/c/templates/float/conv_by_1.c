{# Parameters: kernel; block, what computes the middle of a row. #}
/*
 * One filter at a time. weight [groups x outputs x inputs x kernel], bias of as many elements as there are filters, or NULL.
 */
static void {{ name }}_{{ kernel }}(const {{ name }}_window *window, const {{ name }}_conv_layer *layer, const float *weight,
    const float *bias, const float *x, float *y)
{
    const int flat = window->kernel_height == 1;
    {{ name }}_conv_part part = {{ name }}_conv_start(window, layer);

    for (size_t filter = 0; filter < layer->groups * layer->outputs; ++filter) {
        const float *const image = x + filter / layer->outputs * layer->inputs * part.channel_step;
        const float *const first_bias = bias != NULL ? bias + filter : NULL;
        const float *const first_weight = weight + filter * part.filter_size;
        float *const result = y + filter * part.output_size;

        {{ name }}_conv_columns_by_1(window, layer, &part, 0, layer->first_column, first_weight, first_bias, image, result);
        {{ name }}_conv_columns_by_1(window, layer, &part, layer->end_column, window->output_width, first_weight, first_bias,
            image, result);
        part.position_step = window->stride_width;
        part.result_step = 1;
        part.columns = window->kernel_width;
        part.skipped_columns = 0;
        for (size_t row = 0; row < window->output_height; ++row) {
            const size_t top = row * window->stride_height - window->padding_height;
            const size_t left = layer->first_column * window->stride_width - window->padding_width;
            size_t i;
            const size_t rows = {{ name }}_window_inside(top, window->kernel_height, window->dilation_height,
                window->input_height, &i);
            const float *const line = rows != 0 ? image + (top + i * window->dilation_height) * window->input_width : image;

            part.channels = flat ? rows : layer->inputs;
            part.rows = flat ? layer->inputs : rows;
            part.skipped_rows = (window->kernel_height - rows) * window->kernel_width;
            {{ name }}_{{ block }}(&part, first_weight + i * window->kernel_width, first_bias, line + left,
                result + row * window->output_width + layer->first_column, layer->end_column - layer->first_column);
        }
    }
}
