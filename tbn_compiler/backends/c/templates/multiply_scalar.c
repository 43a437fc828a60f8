{% set function, parameters = "multiply_scalar", ["scalar"] %}
{% set expression = "x[i] * scalar" %}
{% include "loops/unary.c" %}
