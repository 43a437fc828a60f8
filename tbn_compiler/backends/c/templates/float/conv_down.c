{# Parameters: kernel; columns, what computes columns of the output. #}
/* One filter at a time, down the columns: for narrow images. weight and bias as for {{ name }}_conv. */
static void {{ name }}_{{ kernel }}(const {{ name }}_window *window, const {{ name }}_conv_layer *layer, const float *weight,
    const float *bias, const float *x, float *y)
{
    {{ name }}_conv_part part = {{ name }}_conv_start(window, layer);

    for (size_t filter = 0; filter < layer->groups * layer->outputs; ++filter) {
        {{ name }}_{{ columns }}(window, layer, &part, 0, window->output_width, weight + filter * part.filter_size,
            bias != NULL ? bias + filter : NULL, x + filter / layer->outputs * layer->inputs * part.channel_step,
            y + filter * part.output_size);
    }
}
