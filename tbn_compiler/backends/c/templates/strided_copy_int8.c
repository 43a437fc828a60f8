{# needs: nest2 #}
{# headers: stdint.h #}
{% set kernel, element = "strided_copy_int8", "int8_t" %}
{% include "loops/strided_copy.c" %}
