{# Parameters: kernel; columns, the width of the window. #}
/* {{ name }}_tiled_patch for windows of {{ columns }} neighbouring columns: fast where all of them are inside the image. */
static void {{ name }}_{{ kernel }}(const {{ name }}_window *window, size_t channels, const float *x, size_t position,
    float *patch)
{
    const size_t outputs = window->output_height * window->output_width;
    const size_t place = position % outputs;
    const size_t height = window->input_height;
    const size_t width = window->input_width;
    const size_t top = place / window->output_width * window->stride_height - window->padding_height;
    const size_t left = place % window->output_width * window->stride_width - window->padding_width;

    if (left >= width || width - left < {{ columns }}) {
        {{ name }}_tiled_patch(window, channels, x, position, patch);
        return;
    }
    x += position / outputs * channels * height * width + left;
    for (; channels != 0; --channels, x += height * width) {
        size_t row = top;

        for (size_t i = window->kernel_height; i != 0; --i, row += window->dilation_height, patch += {{ columns }}) {
            if (row < height) {
                const float *const line = x + row * width;

{% for column in range(columns) %}
                patch[{{ column }}] = line[{{ column }}];
{% endfor %}
            } else {
{% for column in range(columns) %}
                patch[{{ column }}] = 0.0f;
{% endfor %}
            }
        }
    }
}
