{# needs: tiled_conv_transpose, tiled_weight, conv_transpose_start, conv_transpose_spread #}
{% set kind, title, element = "float", "A full-precision tile", "float" %}
{% set product = "tile[t] * scale" %}
{% include "loops/conv_transpose_tiled.c" %}
