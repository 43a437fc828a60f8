{# needs: window, tiled_filter_layer, tiled_fixed #}
{% set number, value, parameter = "int32_t", name ~ "_fixed(*x++, all.shift)", "int precision, int32_t *block, " %}
{% include "tiled/planes.c" %}
