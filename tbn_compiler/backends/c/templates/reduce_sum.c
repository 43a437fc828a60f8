{% set function, title, start, step = "sum", "The sum", "0.0f", "value += first[j * inner];" %}
{% include "loops/reduce.c" %}
