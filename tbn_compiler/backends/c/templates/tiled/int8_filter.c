{# Parameters: result, as in int8_finish.c. What int8_value.c needs of a filter, and its signs as factors. #}
        const size_t different = filter % layer->rows;
        const size_t scale_index = different * layer->scale_per_row + filter / layer->rows * layer->scale_per_repeat;
{% if integers %}
        const int32_t multiplier = layer->multiplier[scale_index];
        const int32_t bias = layer->offset != NULL ? layer->offset[filter] : layer->half;
{% else %}
        const float scale = layer->scale[scale_index];
        const float bias = layer->bias != NULL ? layer->bias[filter] : 0.0f;
{% endif %}

        for (size_t k = 0, bit = different * size; k < size; ++k, ++bit) {
            taps[k] = ((unsigned)table[bit / 8] >> bit % 8 & 1u) != 0 ? 1 : -1;
        }
