{# headers: math.h #}
{% set function, parameters = "sigmoid", [] %}
{% set expression = "1.0f / (1.0f + expf(-x[i]))" %}
{% include "loops/unary.c" %}
