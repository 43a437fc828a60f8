{# needs: nest3 #}
{% set function, expression = "divide", "a[i] / b[i]" %}
{% include "loops/broadcast.c" %}
