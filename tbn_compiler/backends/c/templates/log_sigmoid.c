{# headers: math.h #}
{% set function, parameters = "log_sigmoid", [] %}
{% set expression = "(x[i] < 0.0f ? x[i] : 0.0f) - log1pf(expf(-fabsf(x[i])))" %}
{% include "loops/unary.c" %}
