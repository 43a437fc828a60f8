{% set function, expression = "divide", "a[i] / b[i]" %}
{% include "loops/binary.c" %}
