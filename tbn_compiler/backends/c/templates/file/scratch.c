{# Memory for numbers of several types, of which each place holds one at a time. #}
{% macro scratch_union(symbol, bytes, indent="") -%}
{{ indent }}static union {
{{ indent }}    float floats[{{ bytes }} / sizeof(float)];
{{ indent }}    int32_t integers[{{ bytes }} / sizeof(int32_t)];
{{ indent }}} {{ symbol }};
{%- endmacro %}
