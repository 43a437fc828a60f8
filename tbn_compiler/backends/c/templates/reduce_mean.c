{% set function, title, start, step = "mean", "The mean", "0.0f", "value += first[j * inner];" %}
{% set result = "value / (float)count" %}
{% include "loops/reduce.c" %}
