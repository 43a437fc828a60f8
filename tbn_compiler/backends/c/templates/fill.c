{% set kernel, element = "fill", "float" %}
{% include "loops/fill.c" %}
