{# needs: nest3 #}
{% set function, expression = "subtract", "a[i] - b[i]" %}
{% include "loops/broadcast.c" %}
