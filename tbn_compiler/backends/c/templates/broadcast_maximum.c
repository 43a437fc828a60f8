{# needs: nest3 #}
{% set note = " NaN stays." %}
{% set function, expression = "maximum", "(a[i] > b[i] || a[i] != a[i]) ? a[i] : b[i]" %}
{% include "loops/broadcast.c" %}
