{# needs: nest3 #}
{% set function, expression = "prelu", "a[i] < 0.0f ? b[i] * a[i] : a[i]" %}
{% include "loops/broadcast.c" %}
