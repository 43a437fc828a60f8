{# headers: math.h #}
{% set function, parameters = "exp", [] %}
{% set expression = "expf(x[i])" %}
{% include "loops/unary.c" %}
