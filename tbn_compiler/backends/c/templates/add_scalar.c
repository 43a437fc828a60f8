{% set function, parameters = "add_scalar", ["scalar"] %}
{% set expression = "x[i] + scalar" %}
{% include "loops/unary.c" %}
