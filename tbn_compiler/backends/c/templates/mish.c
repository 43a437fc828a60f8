{# headers: math.h #}
{% set function, parameters = "mish", [] %}
{% set expression = "x[i] * tanhf(x[i] > 20.0f ? x[i] : log1pf(expf(x[i])))" %}
{% include "loops/unary.c" %}
