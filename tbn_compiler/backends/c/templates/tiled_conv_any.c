/* {{ "A full-precision tile" if kind == "float" else "Packed bits" }} in any layout, one weight at a time. */
static void {{ name }}_tiled_conv_{{ kind }}(const {{ name }}_tiled_conv *layer, const {{ name }}_tiled_weight *weight,
    const {{ name }}_window *window, const {{ element }} *tile, const float *x, float *y)
{
    const size_t input_size = window->input_height * window->input_width;
    const size_t output_size = window->output_height * window->output_width;
    const size_t channels = weight->row_size / weight->kernel_size; /* that a row reads, copies included */

    for (size_t group = 0; group < layer->groups; ++group) {
        for (size_t row = 0; row < layer->unique_rows; ++row) {
            const size_t filter = group * (layer->out_channels / layer->groups) + row;

            for (size_t position = 0; position < output_size; ++position) {
                const size_t top = position / window->output_width * window->stride_height;
                const size_t left = position % window->output_width * window->stride_width;
                float value = 0.0f;

                for (size_t column = 0; column < weight->row_size; ++column) {
                    const size_t channel = group * channels + column / weight->kernel_size;
                    const size_t i = column % weight->kernel_size / window->kernel_width * window->dilation_height + top;
                    const size_t j = column % window->kernel_width * window->dilation_width + left;

                    if (i >= window->padding_height && i - window->padding_height < window->input_height
                        && j >= window->padding_width && j - window->padding_width < window->input_width) {
                        const size_t pixel = (i - window->padding_height) * window->input_width + j - window->padding_width;
                        float scale;
                        const size_t t = {{ name }}_tiled_position(weight, filter, column, &scale);

                        if (weight->input_alpha != NULL) {
                            scale *= weight->input_alpha[channel / layer->in_channels];
                        }
                        scale *= x[channel % layer->in_channels * input_size + pixel];
{% if kind == "bits" %}
                        value += ((unsigned)tile[t / 8] >> (t % 8) & 1u) ? scale : -scale;
{% else %}
                        value += tile[t] * scale;
{% endif %}
                    }
                }
                {{ name }}_tiled_conv_store(layer, group, row, value, position, output_size, y);
            }
        }
    }
}
