{# headers: math.h #}
{% set function, parameters = "sin", [] %}
{% set expression = "sinf(x[i])" %}
{% include "loops/unary.c" %}
