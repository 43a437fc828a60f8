{% set function, parameters = "leaky_relu", ["slope"] %}
{% set expression = "x[i] < 0.0f ? slope * x[i] : x[i]" %}
{% include "loops/unary.c" %}
