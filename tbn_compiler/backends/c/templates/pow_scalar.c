{# headers: math.h #}
{% set function, parameters = "pow_scalar", ["exponent"] %}
{% set expression = "powf(x[i], exponent)" %}
{% include "loops/unary.c" %}
