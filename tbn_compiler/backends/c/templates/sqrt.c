{# headers: math.h #}
{% set function, parameters = "sqrt", [] %}
{% set expression = "sqrtf(x[i])" %}
{% include "loops/unary.c" %}
