{# headers: stdint.h #}
{% set function, title, comparison = "argmax", "largest", ">" %}
{% include "loops/reduce_index.c" %}
