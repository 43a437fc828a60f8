{% set function, expression = "add", "a[i] + b[i]" %}
{% include "loops/binary.c" %}
