{% set function, expression = "subtract", "a[i] - b[i]" %}
{% include "loops/binary.c" %}
