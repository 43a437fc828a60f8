{# headers: math.h #}
{% set function, parameters = "log", [] %}
{% set expression = "logf(x[i])" %}
{% include "loops/unary.c" %}
