{# headers: math.h #}
{% set function, parameters = "tanh", [] %}
{% set expression = "tanhf(x[i])" %}
{% include "loops/unary.c" %}
