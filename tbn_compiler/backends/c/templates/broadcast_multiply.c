{# needs: nest3 #}
{% set function, expression = "multiply", "a[i] * b[i]" %}
{% include "loops/broadcast.c" %}
