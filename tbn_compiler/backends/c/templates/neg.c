{% set function, parameters = "neg", [] %}
{% set expression = "-x[i]" %}
{% include "loops/unary.c" %}
