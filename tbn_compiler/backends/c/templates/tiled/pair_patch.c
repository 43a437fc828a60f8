{# Parameters: kernel; columns, the width of the window; stride, the distance of two positions. #}
{% set pixels = columns + stride %}
{% set used = range(pixels) if stride <= columns else (range(columns) | list) + (range(stride, pixels) | list) %}
{% macro gather(first, last) %}
        for (; channels != 0; --channels, x += height * width) {
            size_t row = top;

            for (size_t i = window->kernel_height; i != 0; --i, row += window->dilation_height, patch += {{ columns }}) {
                if (row < height) {
                    const int8_t *const pixel = x + row * width;
{% for place in used if first <= place < last %}
                    const int32_t x{{ place }} = pixel[{{ place - first }}];
{% endfor %}

{% for column in range(columns) %}
{% set low = "x%d" | format(column) if first <= column < last %}
{% set high = "x%d * 65536" | format(column + stride) if first <= column + stride < last %}
                    patch[{{ column }}] = {{ [low, high] | select | join(" + ") or "0" }};
{% endfor %}
                } else {
{% for column in range(columns) %}
                    patch[{{ column }}] = 0;
{% endfor %}
                }
            }
        }
{% endmacro %}
/* {{ name }}_tiled_pair_patch for windows of {{ columns }} neighbouring column{{ "s" if columns > 1 }}, positions {{ stride }} apart. */
static void {{ name }}_{{ kernel }}(const {{ name }}_window *window, size_t channels, size_t all_channels, const int8_t *x, size_t pair,
    int32_t *patch)
{
    const size_t pairs = (window->output_width + 1) / 2;
    const size_t line = pair / pairs;
    const size_t height = window->input_height;
    const size_t width = window->input_width;
    const size_t top = line % window->output_height * window->stride_height - window->padding_height;
    const size_t left = pair % pairs * {{ 2 * stride }} - window->padding_width;
    const size_t image = line / window->output_height * all_channels * height * width;

    /* Both windows inside the image, or all of them but a column left or right of it. */
    if (left < width && width - left >= {{ pixels }}) {
        x += image + left;
{{ gather(0, pixels) }}{% if columns > 1 %}
    } else if (left == (size_t)-1 && width >= {{ pixels - 1 }}) {
        x += image;
{{ gather(1, pixels) }}{% endif %}
    } else if (left < width && width - left == {{ pixels - 1 }}) {
        x += image + left;
{{ gather(0, pixels - 1) }}{% if columns > 1 or stride > 1 %}
    } else if (left < width && width - left == {{ pixels - 2 }}) {
        x += image + left;
{{ gather(0, pixels - 2) }}{% endif %}
    } else {
        {{ name }}_tiled_pair_patch(window, channels, all_channels, x, pair, patch);
    }
}
