{# Parameters: kernel; stride, the distance of two positions, 1 or 2; result, as in int8_finish.c. #}
{% set integers = result != "float" %}
{% set type = "int8_t" if integers else "float" %}
{% set first, second = (("x0", "x1", "x2"), ("x1", "x2", "x3")) if stride == 1 else (("x0", "x1", "x2"), ("x4", "x5", "x6")) %}
{% set sums = ("(int16_t)sum0", "(int16_t)sum1", "(sum0 + 0x8000) >> 16", "(sum1 + 0x8000) >> 16") if stride == 1 else
              ("(int16_t)sum0", "(sum0 + 0x8000) >> 16", "(int16_t)sum1", "(sum1 + 0x8000) >> 16") %}
{% from "tiled/int8_value.c" import value with context %}
/*
 * A convolution of each channel with 3 x 3 filters of signs, at four neighbouring positions {{ stride }} apart. The image lies in
 * padded with 128 added, so that two bytes of a word come apart as x0 + 65536 * x1; the sums begin with what that adds.
 * table holds the signs of the different filters, bit by bit, 1 for +; taps is memory for one of them.
 */
static void {{ name }}_{{ kernel }}(const {{ name }}_window *window, const {{ name }}_tiled_int8_{{ "layer" if integers else "result" }} *layer, size_t filters,
    const uint8_t *table, int32_t *taps, uint8_t *padded, const int8_t *x, {{ type }} *y)
{
    const size_t positions = window->output_width;
    const size_t pitch = (positions + 3) / 4 * {{ 4 * stride }} + 4;
    const size_t lines = (window->output_height - 1) * window->stride_height + 3;
    const size_t width = window->input_width;
    /* The windows may end before the image does. */
    const size_t below = lines - window->padding_height;
    const size_t right = pitch - window->padding_width;
    const size_t height = window->input_height < below ? window->input_height : below;
    const size_t copied = width < right ? width : right;
    uint8_t *const inside = padded + window->padding_height * pitch + window->padding_width;
    const size_t size = 9;
    const uint32_t mask = 0x00ff00ffu;
    const {{ type }} *const end = y + layer->rows * layer->repeats * window->output_height * positions;
{% include "tiled/int8_constants.c" %}

    memset(padded, 128, lines * pitch);
    for (size_t filter = 0; filter < layer->rows * layer->repeats; ++filter) {
        int32_t start = 0;
{% include "tiled/int8_filter.c" %}

        for (size_t k = 0; k < size; ++k) {
            start -= taps[k] * (128 + 128 * 65536);
        }
        if (filter % filters == 0) {
            {{ name }}_tiled_int8_inside(x, width, height, copied, pitch, inside);
            x += window->input_height * width;
        }
        for (size_t line = 0; line < window->output_height; ++line) {
            const uint8_t *pixel = padded + line * window->stride_height * pitch;

            for (size_t column = 0; column < positions; column += 4, pixel += {{ 4 * stride }}) {
                const size_t left = positions - column;
                int32_t sum0 = start;
                int32_t sum1 = start;

{% for row in range(3) %}
                {
{% set place = ("", "pitch + ", "2 * pitch + ")[row] %}
                    const uint32_t word = {{ name }}_four_bytes(pixel{{ (" + " ~ place)[:-3] if row }});
                    const uint32_t next = {{ name }}_four_bytes(pixel + {{ place }}4);
                    const uint32_t x0 = word & mask;
                    const uint32_t x1 = word >> 8 & mask;
                    const uint32_t x4 = next & mask;
                    const uint32_t x5 = next >> 8 & mask;
                    const uint32_t x2 = x0 >> 16 | x4 << 16;
{% if stride == 1 %}
                    const uint32_t x3 = x1 >> 16 | x5 << 16;
{% else %}
                    const uint32_t x6 = x4 >> 16 | (uint32_t)pixel[{{ place }}8] << 16;
{% endif %}

{% for sum, pixels in (("sum0", first), ("sum1", second)) %}
{% for pixel in pixels %}
                    {{ sum }} += taps[{{ 3 * row + loop.index0 }}] * (int32_t){{ pixel }};
{% endfor %}
{% endfor %}
                }
{% endfor %}
                {
{% for sum in sums %}
                    const int32_t total{{ loop.index0 }} = {{ sum }};
{% endfor %}
{% for sum in sums %}
                    const {{ type }} y{{ loop.index0 }} = {{ value("total%d" | format(loop.index0)) }};
{% endfor %}

                    /* What is stored behind the end of a line is overwritten by the next one. */
                    y[0] = y0;
                    if (end - y >= 4) {
                        y[1] = y1;
                        y[2] = y2;
                        y[3] = y3;
                    } else if (left > 1) {
                        y[1] = y1;
                        if (left > 2) {
                            y[2] = y2;
                        }
                    }
                    y += left < 4 ? left : 4;
                }
            }
        }
    }
}
