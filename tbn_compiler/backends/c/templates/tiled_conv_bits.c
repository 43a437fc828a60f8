{# needs: tiled_conv, tiled_weight #}
{% set kind, element = "bits", "uint8_t" %}
{% include "tiled_conv_any.c" %}
