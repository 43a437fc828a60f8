{% set function, title, start, step = "prod", "The product", "1.0f", "value *= first[j * inner];" %}
{% include "loops/reduce.c" %}
