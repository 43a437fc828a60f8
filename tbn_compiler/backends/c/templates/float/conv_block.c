{# Parameters: kernel; filters and positions, taken at once; columns of the window, or 0 for any number; down, whether
   positions lie below one another. #}
{% macro numbered(word, i, count) %}{{ word }}{{ i if count > 1 }}{% endmacro %}
{% macro w(filter) %}{{ numbered("w", filter, filters) }}{% endmacro %}
{% macro line(position) %}{{ numbered("line", position, positions) }}{% endmacro %}
{% macro pixel(position) %}{{ numbered("pixel", position, positions) }}{% endmacro %}
{% macro sum(filter, position) %}{{ numbered("sum", filter, filters) }}{{ "_" if filters > 1 and positions > 1 }}{{ position if positions > 1 }}{% endmacro %}
{% macro body() %}
    const float *channel = x{{ " + position * part->position_step" if positions > 1 }};
    float *{{ "const " if filters == 1 }}result = y{{ " + position" if positions > 1 }}{{ " * part->result_step" if down }};
    const float *{{ w(0) }} = weight;
{% for filter in range(1, filters) %}
    const float *{{ w(filter) }} = {{ w(filter - 1) }} + part->filter_size;
{% endfor %}
{% for filter in range(filters) %}
    float {{ sum(filter, 0) }} = bias != NULL ? {{ "bias[%d]" | format(filter) if filters > 1 else "*bias" }} : 0.0f;
{% for position in range(1, positions) %}
    float {{ sum(filter, position) }} = {{ sum(filter, 0) }};
{% endfor %}
{% endfor %}

    for (size_t channels = part->channels; channels != 0; --channels, channel += part->channel_step) {
        const float *{{ line(0) }} = channel;

        for (size_t rows = part->rows; rows != 0; --rows, {{ line(0) }} += part->row_step) {
{% if columns %}
{% for position in range(1, positions) %}
            const float *const {{ line(position) }} = {{ line(position - 1) }} + part->position_step;
{% endfor %}

{% for column in range(columns) %}
{% for filter in range(filters) %}
{% for position in range(positions) %}
            {{ sum(filter, position) }} += {{ w(filter) }}[{{ column }}] * {{ line(position) }}[{{ column }}];
{% endfor %}
{% endfor %}
{% endfor %}
{% for filter in range(filters) %}
            {{ w(filter) }} += {{ columns }};
{% endfor %}
{% else %}
            const float *{{ pixel(0) }} = {{ line(0) }};
{% for position in range(1, positions) %}
            const float *{{ pixel(position) }} = {{ pixel(position - 1) }} + part->position_step;
{% endfor %}

            for (size_t columns = part->columns; columns != 0; --columns) {
{% for filter in range(filters) %}
{% for position in range(positions) %}
                {{ sum(filter, position) }} += *{{ w(filter) }}{{ "++" if position == positions - 1 }} * *{{ pixel(position) }};
{% endfor %}
{% endfor %}
{% for position in range(positions) %}
                {{ pixel(position) }} += part->column_step;
{% endfor %}
            }
{% for filter in range(filters) %}
            {{ w(filter) }} += part->skipped_columns;
{% endfor %}
{% endif %}
        }
{% for filter in range(filters) %}
        {{ w(filter) }} += part->skipped_rows;
{% endfor %}
    }
{% for filter in range(filters) %}
{% for position in range(positions) %}
    {{ "*result" if positions == 1 else "result[%s]" | format("%s%s" | format("" if position == 1 else "%d * " | format(position), "part->result_step") if down and position else position) }} = {{ name }}_activate({{ sum(filter, position) }}, part->relu);
{% endfor %}
{% if filter < filters - 1 %}
    result += part->output_size;
{% endif %}
{% endfor %}
{% endmacro %}
{% set what = "%d filters" | format(filters) if filters > 1 else "One filter" %}
{% if positions > 1 %}
/*
 * {{ what }} at count output positions of a {{ "column" if down else "row" }}, {{ positions }} at a time; the last ones are the last {{ positions }}, some of them once more.
 */
{% else %}
/* {{ what }} at one output position, over any part of the window. */
{% endif %}
static void {{ name }}_{{ kernel }}(const {{ name }}_conv_part *part, const float *weight,
    const float *bias, const float *x, float *y{{ ", size_t count" if positions > 1 }})
{
{% if positions > 1 %}
    for (size_t place = 0; place < count; place += {{ positions }}) {
        const size_t position = count - place < {{ positions }} ? count - {{ positions }} : place;
        {{ body() | trim | indent(4) }}
    }
{% else %}
{{ body() -}}
{% endif %}
}
