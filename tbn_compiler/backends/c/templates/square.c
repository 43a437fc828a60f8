{% set function, parameters = "square", [] %}
{% set expression = "x[i] * x[i]" %}
{% include "loops/unary.c" %}
