{# headers: math.h #}
{% set function, parameters = "cos", [] %}
{% set expression = "cosf(x[i])" %}
{% include "loops/unary.c" %}
