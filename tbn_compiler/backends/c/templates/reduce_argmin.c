{# headers: stdint.h #}
{% set function, title, comparison = "argmin", "smallest", "<" %}
{% include "loops/reduce_index.c" %}
