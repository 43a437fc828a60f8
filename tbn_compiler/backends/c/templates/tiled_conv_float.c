{# needs: tiled_conv, tiled_weight #}
{% set kind, element = "float", "float" %}
{% include "tiled_conv_any.c" %}
