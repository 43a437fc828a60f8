{% set function, parameters = "divide_into_scalar", ["scalar"] %}
{% set expression = "scalar / x[i]" %}
{% include "loops/unary.c" %}
