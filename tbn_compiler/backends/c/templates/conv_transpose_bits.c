{# needs: tiled_conv_transpose, tiled_weight, conv_transpose_start, conv_transpose_spread #}
{% set kind, title, element = "bits", "Packed bits", "uint8_t" %}
{% set product = "((unsigned)tile[t / 8] >> (t % 8) & 1u) ? scale : -scale" %}
{% include "loops/conv_transpose_tiled.c" %}
