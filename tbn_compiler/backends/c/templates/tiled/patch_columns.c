{# Parameters: kernel; general, the kernel for every window; columns, the width of the window; grouped, as there. #}
/* {{ name }}_{{ general }} for windows of {{ columns }} neighbouring columns: fast where all of them are inside the image. */
static void {{ name }}_{{ kernel }}(const {{ name }}_window *window, size_t channels, {{ "size_t groups, " if grouped }}const float *x,{{ "\n    " if grouped else " " }}size_t position,{{ " " if grouped else "\n    " }}float *patch)
{
    const size_t outputs = window->output_height * window->output_width;
    const size_t place = position % outputs;
    const size_t height = window->input_height;
    const size_t width = window->input_width;
    const size_t top = place / window->output_width * window->stride_height - window->padding_height;
    const size_t left = place % window->output_width * window->stride_width - window->padding_width;

    if (left >= width || width - left < {{ columns }}) {
        {{ name }}_{{ general }}(window, channels, {{ "groups, " if grouped }}x, position, patch);
        return;
    }
    x += position / outputs * channels * height * width + left;
{% if grouped %}
    for (size_t channel = 0, count = channels; count != 0; --count) {
        const float *const image = x + channel * height * width;
{% else %}
    for (; channels != 0; --channels, x += height * width) {
{% endif %}
        size_t row = top;

        for (size_t i = window->kernel_height; i != 0; --i, row += window->dilation_height, patch += {{ columns }}) {
            if (row < height) {
                const float *const line = {{ "image" if grouped else "x" }} + row * width;

{% for column in range(columns) %}
                patch[{{ column }}] = line[{{ column }}];
{% endfor %}
            } else {
{% for column in range(columns) %}
                patch[{{ column }}] = 0.0f;
{% endfor %}
            }
        }
{% if grouped %}
        /* Behind the last channel of a group comes the first one of the next group. */
        channel = channel + groups < channels ? channel + groups : channel + groups + 1 - channels;
{% endif %}
    }
}
