{% set function, parameters = "hardsigmoid", [] %}
{% set expression = "x[i] <= -3.0f ? 0.0f : x[i] >= 3.0f ? 1.0f : (x[i] + 3.0f) / 6.0f" %}
{% include "loops/unary.c" %}
