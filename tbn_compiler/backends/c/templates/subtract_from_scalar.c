{% set function, parameters = "subtract_from_scalar", ["scalar"] %}
{% set expression = "scalar - x[i]" %}
{% include "loops/unary.c" %}
