{# headers: math.h #}
{% set function, parameters = "silu", [] %}
{% set expression = "x[i] / (1.0f + expf(-x[i]))" %}
{% include "loops/unary.c" %}
