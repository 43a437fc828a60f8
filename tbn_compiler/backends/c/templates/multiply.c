{% set function, expression = "multiply", "a[i] * b[i]" %}
{% include "loops/binary.c" %}
