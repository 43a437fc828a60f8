{# Parameters: kernel; pair, whether the sums are those of two vectors; result: "float", "int8", or "relu" for int8 from 0 to
   127. #}
{% set integers = result != "float" %}
{% set sums = ("first", "second") if pair else ("first",) %}
{% macro value(sum) -%}
{% if result == "float" -%}
{{ name }}_activate(scale * (float){{ sum }} + bias, relu)
{%- elif result == "int8" -%}
{{ name }}_requantize({{ sum }}, multiplier, bias, shift, low, high)
{%- else -%}
{{ name }}_requantize({{ sum }}, multiplier, bias, shift, 0, 127)
{%- endif %}
{%- endmacro %}
/* Results of {{ "two vectors, whose sums are side by side in one integer" if pair else "one vector" }}: {{ {"float": "float", "int8": "int8", "relu": "int8 from 0 to 127"}[result] }}. */
static void {{ name }}_{{ kernel }}(const {{ name }}_tiled_int8_{{ "layer" if integers else "result" }} *layer, const int32_t *sums,{{ " size_t pair," if pair }}
    {{ "int32_t *apart, " if pair }}{{ "int8_t" if integers else "float" }} *y)
{
    const size_t rows = layer->rows;
    const size_t scale_per_row = layer->scale_per_row;
{% if pair %}
    const size_t pairs = (layer->width + 1) / 2;
    const size_t line = pair / pairs;
    const size_t column = pair % pairs * 2;
    const size_t stride = layer->output_stride;
    /* The last position of an odd line stores its result over that of what would be its neighbour. */
    const size_t next = column + 1 < layer->width ? layer->position_stride : 0;
{% endif %}
{% if integers %}
    /* Without offsets of its own, every output has half a step. */
    const int32_t *offset = layer->offset != NULL ? layer->offset : &layer->half;
    const size_t offset_step = layer->offset != NULL ? 1 : 0;
{% else %}
    const float *offset = layer->bias;
{% endif %}
{% include "tiled/int8_constants.c" %}
{% if pair %}
    const size_t parts = layer->parts;
    const size_t part_sums = layer->part_sums;

    y += line / layer->lines * layer->sample_stride + line % layer->lines * layer->line_stride + column * layer->position_stride;
    for (size_t row = 0; row < rows; ++row) {
        int32_t first = 0;
        int32_t second = 0;

        for (size_t part = 0; part < parts; ++part) {
            const int32_t packed = sums[part * part_sums + row];

            first += (int16_t)packed;
            second += (packed + 0x8000) >> 16;
        }
        apart[2 * row] = first{{ " * factor" if integers }};
        apart[2 * row + 1] = second{{ " * factor" if integers }};
    }
{% endif %}
    for (size_t repeat = 0; repeat < layer->repeats; ++repeat) {
{% if integers %}
        const int32_t *next_multiplier = layer->multiplier + repeat * layer->scale_per_repeat;
{% else %}
        const float *next_scale = layer->scale + repeat * layer->scale_per_repeat;
{% endif %}

        for (size_t row = 0; row < rows; ++row) {
{% if pair %}
            const int32_t first = apart[2 * row];
            const int32_t second = apart[2 * row + 1];
{% else %}
            const int32_t first = sums[row]{{ " * factor" if integers }};
{% endif %}
{% if integers %}
            const int32_t multiplier = *next_multiplier;
            const int32_t bias = *offset;
{% else %}
            const float scale = *next_scale;
            const float bias = offset != NULL ? *offset++ : 0.0f;
{% endif %}

{% if pair %}
            y[next] = {{ value("second") }};
            *y = {{ value("first") }};
            y += stride;
{% else %}
            *y++ = {{ value("first") }};
{% endif %}
{% if integers %}
            next_multiplier += scale_per_row;
            offset += offset_step;
{% else %}
            next_scale += scale_per_row;
{% endif %}
        }
    }
}
