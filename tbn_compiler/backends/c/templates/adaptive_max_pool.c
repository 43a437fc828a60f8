{% set function, title, start = "max", "maximum", "x[top * input_width + left]" %}
{% set step, result = "value = (pixel > value || pixel != pixel) ? pixel : value;", "value" %}
{% include "loops/adaptive_pool.c" %}
