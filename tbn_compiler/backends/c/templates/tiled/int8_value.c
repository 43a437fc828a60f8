{# Parameters: result, as in int8_finish.c. The result of a sum, where the variables of int8_filter.c are at hand. #}
{% macro value(sum) -%}
{% if result == "float" -%}
{{ name }}_activate(scale * (float){{ sum }} + bias, relu)
{%- elif result == "int8" -%}
{{ name }}_requantize({{ sum }} * factor, multiplier, bias, shift, low, high)
{%- else -%}
{{ name }}_requantize({{ sum }} * factor, multiplier, bias, shift, 0, 127)
{%- endif %}
{%- endmacro %}
