{# headers: string.h #}
{% set kernel, element = "copy_blocks", "float" %}
{% include "loops/copy_blocks.c" %}
