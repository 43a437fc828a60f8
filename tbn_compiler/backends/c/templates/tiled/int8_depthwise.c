{# Parameters: kernel; columns, the width of the window, and stride, the distance of two positions, or 0 for any;
   result, as in int8_finish.c. #}
{% set integers = result != "float" %}
{% from "tiled/int8_value.c" import value with context %}
{% macro sums(first, last) %}
{% if columns %}
                    for (size_t i = window->kernel_height; i != 0; --i, row += window->dilation_height, tap += {{ columns }}) {
                        if (row < height) {
                            const int8_t *const pixel = image + row * width{{ " + left" if first == 0 }};
{% for place in range(columns + stride) if first <= place < last %}
                            const int32_t x{{ place }} = pixel[{{ place - first }}];
{% endfor %}

{% for column in range(columns) %}
{% set low = "x%d" | format(column) if first <= column < last %}
{% set high = "x%d * 65536" | format(column + stride) if first <= column + stride < last %}
{% if low and high %}
                            sum += tap[{{ column }}] * ({{ low }} + {{ high }});
{% elif low or high %}
                            sum += tap[{{ column }}] * {{ low or high }};
{% endif %}
{% endfor %}
                        }
                    }
{% endif %}
{% endmacro %}
/*
 * A convolution of each channel with filters of signs, at two neighbouring positions at a time, as x0 + 65536 * x1.
{% if columns %}
 * Windows are {{ columns }} columns wide, positions {{ stride }} apart.
{% endif %}
 * table holds the signs of the different filters, bit by bit, 1 for +; taps is memory for one of them.
 */
static void {{ name }}_{{ kernel }}(const {{ name }}_window *window, const {{ name }}_tiled_int8_{{ "layer" if integers else "result" }} *layer, size_t filters,
    const uint8_t *table, int32_t *taps, const int8_t *x, {{ "int8_t" if integers else "float" }} *y)
{
    const size_t height = window->input_height;
    const size_t width = window->input_width;
    const size_t size = window->kernel_height * window->kernel_width;
{% include "tiled/int8_constants.c" %}

    for (size_t filter = 0; filter < layer->rows * layer->repeats; ++filter) {
        const int8_t *const image = x + filter / filters * height * width;
{% include "tiled/int8_filter.c" %}

        for (size_t line = 0; line < window->output_height; ++line) {
            const size_t top = line * window->stride_height - window->padding_height;

            for (size_t column = 0; column < window->output_width; column += 2) {
                /* The last position of an odd line stores its result over that of what would be its neighbour. */
                const size_t next = column + 1 < window->output_width ? 1 : 0;
                const size_t left = column * window->stride_width - window->padding_width;
                const int32_t *tap = taps;
                size_t row = top;
                int32_t sum = 0;

{% if columns %}
                /* Both windows inside the image, or all of them but a column left or right of it. */
                if (left < width && width - left >= {{ columns + stride }}) {
{{ sums(0, columns + stride) }}                } else if (left == (size_t)-1 && width >= {{ columns + stride - 1 }}) {
{{ sums(1, columns + stride) }}                } else if (left < width && width - left == {{ columns + stride - 1 }}) {
{{ sums(0, columns + stride - 1) }}                } else if (left < width && width - left == {{ columns + stride - 2 }}) {
{{ sums(0, columns + stride - 2) }}                } else {
{% endif %}
{% set indent = "    " if columns else "" %}
{% for text in (
    "for (size_t i = window->kernel_height; i != 0; --i, row += window->dilation_height) {",
    "    size_t place = left;",
    "",
    "    for (size_t j = window->kernel_width; j != 0; --j, place += window->dilation_width, ++tap) {",
    "        if (row < height && place < width) {",
    "            sum += *tap * image[row * width + place];",
    "        }",
    "        if (row < height && place + window->stride_width < width) {",
    "            sum += *tap * image[row * width + place + window->stride_width] * 65536;",
    "        }",
    "    }",
    "}",
) %}
{{ "                " ~ indent ~ text if text }}
{% endfor %}
{% if columns %}
                }
{% endif %}
                {
                    const int32_t first = (int16_t)sum;
                    const int32_t second = (sum + 0x8000) >> 16;

                    y[next] = {{ value("second") }};
                    *y = {{ value("first") }};
                    y += 1 + next;
                }
            }
        }
    }
}
