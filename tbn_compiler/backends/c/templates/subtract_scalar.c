{% set function, parameters = "subtract_scalar", ["scalar"] %}
{% set expression = "x[i] - scalar" %}
{% include "loops/unary.c" %}
