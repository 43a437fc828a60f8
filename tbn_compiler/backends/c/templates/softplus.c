{# headers: math.h #}
{% set function, parameters = "softplus", ["beta", "threshold"] %}
{% set expression = "beta * x[i] > threshold ? x[i] : log1pf(expf(beta * x[i])) / beta" %}
{% include "loops/unary.c" %}
