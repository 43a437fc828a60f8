{# headers: string.h #}
{% set kernel, element = "copy", "float" %}
{% include "loops/copy.c" %}
