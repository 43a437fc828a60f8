{# headers: math.h #}
{% set function, parameters = "abs", [] %}
{% set expression = "fabsf(x[i])" %}
{% include "loops/unary.c" %}
