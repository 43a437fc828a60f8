{# headers: math.h #}
{% set function, parameters = "gelu", [] %}
{% set expression = "0.5f * x[i] * (1.0f + erff(x[i] * 0.707106781f))" %}
{% include "loops/unary.c" %}
