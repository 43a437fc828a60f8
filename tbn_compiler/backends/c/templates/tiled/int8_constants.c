{# Parameters: result, as in int8_finish.c. What int8_value.c needs and is the same for all filters. #}
{% if integers %}
    const int shift = layer->shift;
    const int32_t factor = layer->factor;
{% if result == "int8" %}
    const int32_t low = layer->low;
    const int32_t high = layer->high;
{% endif %}
{% else %}
    const int relu = layer->relu;
{% endif %}
