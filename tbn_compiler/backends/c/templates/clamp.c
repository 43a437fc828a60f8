{% set function, parameters = "clamp", ["low", "high"] %}
{% set expression = "x[i] < low ? low : x[i] > high ? high : x[i]" %}
{% include "loops/unary.c" %}
