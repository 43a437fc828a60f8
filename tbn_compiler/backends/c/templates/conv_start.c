{# needs: conv_part #}
/* What is the same for all filters and positions of a layer. */
static {{ name }}_conv_part {{ name }}_conv_start(const {{ name }}_window *window, const {{ name }}_conv_layer *layer)
{
    const size_t size = window->input_height * window->input_width;
    {{ name }}_conv_part part = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0};

    part.channel_step = size;
    /* In a window of one row channels take the place of rows. */
    part.row_step = window->kernel_height == 1 ? size : window->dilation_height * window->input_width;
    part.column_step = window->dilation_width;
    part.position_step = window->stride_width;
    part.filter_size = layer->inputs * window->kernel_height * window->kernel_width;
    part.output_size = window->output_height * window->output_width;
    part.result_step = 1;
    part.relu = layer->relu;
    return part;
}
