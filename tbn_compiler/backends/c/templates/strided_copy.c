{# needs: nest2 #}
{% set kernel, element, index = "strided_copy", "float", none %}
{% include "loops/strided_copy.c" %}
