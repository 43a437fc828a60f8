{# needs: nest3 #}
{% set function, expression = "maximum", "a[i] > b[i] ? a[i] : b[i]" %}
{% include "loops/broadcast.c" %}
