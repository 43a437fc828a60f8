{# headers: math.h #}
{% set function, parameters = "gelu_tanh", [] %}
{% set expression = "0.5f * x[i] * (1.0f + tanhf(0.797884561f * (x[i] + 0.044715f * x[i] * x[i] * x[i])))" %}
{% include "loops/unary.c" %}
