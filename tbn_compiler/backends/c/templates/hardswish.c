{% set function, parameters = "hardswish", [] %}
{% set expression = "x[i] <= -3.0f ? 0.0f : x[i] >= 3.0f ? x[i] : x[i] * (x[i] + 3.0f) / 6.0f" %}
{% include "loops/unary.c" %}
