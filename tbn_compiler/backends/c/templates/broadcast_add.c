{# needs: nest3 #}
{% set function, expression = "add", "a[i] + b[i]" %}
{% include "loops/broadcast.c" %}
