{# Memory for numbers of several types, of which each place holds one at a time. members: C type and name of each. #}
{% macro scratch_union(symbol, bytes, members, indent="") -%}
{{ indent }}static union {
{% for type, member in members.items() %}
{{ indent }}    {{ type }} {{ member }}[{{ bytes }}{{ " / sizeof(%s)" | format(type) if type not in ("int8_t", "uint8_t") }}];
{% endfor %}
{{ indent }}} {{ symbol }};
{%- endmacro %}
