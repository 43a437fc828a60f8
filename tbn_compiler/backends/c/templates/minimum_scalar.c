{% set function, parameters = "minimum_scalar", ["scalar"] %}
{% set expression = "x[i] > scalar ? scalar : x[i]" %}
{% include "loops/unary.c" %}
