{# headers: stdint.h #}
{% set kernel, element = "fill_int8", "int8_t" %}
{% include "loops/fill.c" %}
