{# Parameters: kernel; grouped, whether channels are in the order of column groups. #}
/*
 * The inputs of one output position of a convolution, in the order of a filter: for each channel the elements of the
 * window. position counts through all samples.
{% if grouped %}
 * Channels come by column group: 0, groups, 2 * groups, ..., then 1, groups + 1, ...; groups divides channels.
{% endif %}
 */
static void {{ name }}_{{ kernel }}(const {{ name }}_window *window, size_t channels, {{ "size_t groups, " if grouped }}const float *x,{{ "\n    " if grouped else " " }}size_t position,{{ " " if grouped else "\n    " }}float *patch)
{
    const size_t place = position % (window->output_height * window->output_width);
    const size_t sample = position / (window->output_height * window->output_width);
    const size_t height = window->input_height;
    const size_t width = window->input_width;
    /* Where the window starts. Left of or above the image the subtraction wraps around, to beyond the last element. */
    const size_t top = place / window->output_width * window->stride_height - window->padding_height;
    const size_t left = place % window->output_width * window->stride_width - window->padding_width;

    x += sample * channels * height * width;
{% if grouped %}
    for (size_t channel = 0, count = channels; count != 0; --count) {
        const float *const image = x + channel * height * width;
{% else %}
    for (; channels != 0; --channels, x += height * width) {
{% endif %}
        size_t row = top;

        for (size_t i = 0; i < window->kernel_height; ++i, row += window->dilation_height) {
            size_t column = left;

            for (size_t j = 0; j < window->kernel_width; ++j, column += window->dilation_width) {
                *patch++ = row < height && column < width ? {{ "image" if grouped else "x" }}[row * width + column] : 0.0f;
            }
        }
{% if grouped %}
        /* Behind the last channel of a group comes the first one of the next group. */
        channel = channel + groups < channels ? channel + groups : channel + groups + 1 - channels;
{% endif %}
    }
}
