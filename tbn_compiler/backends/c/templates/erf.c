{# headers: math.h #}
{% set function, parameters = "erf", [] %}
{% set expression = "erff(x[i])" %}
{% include "loops/unary.c" %}
