{% set function, parameters = "relu", [] %}
{% set expression = "x[i] < 0.0f ? 0.0f : x[i]" %}
{% include "loops/unary.c" %}
