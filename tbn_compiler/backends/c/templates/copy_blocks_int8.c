{# headers: string.h #}
{# headers: stdint.h #}
{% set kernel, element = "copy_blocks_int8", "int8_t" %}
{% include "loops/copy_blocks.c" %}
