{# needs: nest2 #}
{% set kernel, element = "strided_copy", "float" %}
{% include "loops/strided_copy.c" %}
