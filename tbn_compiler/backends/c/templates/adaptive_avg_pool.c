{% set function, title, start, step = "avg", "mean", "0.0f", "value += pixel;" %}
{% set result = "value / (float)((bottom - top) * (right - left))" %}
{% include "loops/adaptive_pool.c" %}
