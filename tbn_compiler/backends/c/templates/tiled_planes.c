{# needs: window, tiled_filter_layer #}
{% set number, value, parameter = "float", "", "" %}
{% include "tiled/planes.c" %}
