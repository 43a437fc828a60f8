{# headers: math.h #}
{% set function, parameters = "elu", ["negative", "positive", "slope"] %}
{% set expression = "x[i] > 0.0f ? positive * x[i] : negative * expm1f(slope * x[i])" %}
{% include "loops/unary.c" %}
