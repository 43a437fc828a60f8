{% set function, parameters = "reciprocal", [] %}
{% set expression = "1.0f / x[i]" %}
{% include "loops/unary.c" %}
