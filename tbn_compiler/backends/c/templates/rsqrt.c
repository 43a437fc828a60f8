{# headers: math.h #}
{% set function, parameters = "rsqrt", [] %}
{% set expression = "1.0f / sqrtf(x[i])" %}
{% include "loops/unary.c" %}
