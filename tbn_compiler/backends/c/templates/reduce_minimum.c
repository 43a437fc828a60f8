{% set note = "; NaN if there is one" %}
{% set function, title, start = "minimum", "The smallest", "first[0]" %}
{% set step = "value = (first[j * inner] < value || first[j * inner] != first[j * inner]) ? first[j * inner] : value;" %}
{% include "loops/reduce.c" %}
