{% set function, parameters = "divide_scalar", ["scalar"] %}
{% set expression = "x[i] / scalar" %}
{% include "loops/unary.c" %}
