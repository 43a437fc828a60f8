{# Parameters: kernel; rows, columns, the size of filters; stride, from column to column of the output; channels, whether
   filters have several, whose weights are read again at each position. #}
/* {{ name }}_tiled_filter for filters of {{ rows }} x {{ columns }} elements{{ " of one channel" if not channels }}{{ " with a stride of %d" | format(stride) if stride > 1 }}. */
static void {{ name }}_{{ kernel }}(const {{ name }}_tiled_filter_layer *layer, const {{ name }}_window *window,
    const uint8_t *signs, const float *planes, size_t index, float *weights, float *y)
{
    const size_t down = window->dilation_height * layer->plane_width;

{% include "tiled/filter_start.c" %}
{% if not channels %}
{% for i in range(rows * columns) %}
            const float w{{ i }} = weights[{{ i }}];
{% endfor %}
{% endif %}
            size_t left = window->output_width;

{% for count in (8, 4, 1) if channels or count < 8 %}
{% if count > 1 %}
            for (; left >= {{ count }}; left -= {{ count }}, line += {{ count * stride }}) {
{% else %}
            for (; left != 0; --left, line += {{ stride }}) {
{% endif %}
{% if channels %}
                const float *weight = weights;
                const float *plane = line;
{% else %}
                const float *x = line;
{% endif %}
{% for b in range(count) %}
                float y{{ b }} = bias;
{% endfor %}

{% if channels %}
                for (size_t channel = layer->channels; channel != 0; --channel) {
                    const float *x = plane;

{% endif %}
{% for i in range(rows) %}
{% for j in range(columns) %}
{% for b in range(count) %}
                {{ "    " if channels }}y{{ b }} += {{ "weight[%d]" | format(i * columns + j) if channels else "w%d" | format(i * columns + j) }} * x[{{ b * stride + j }}];
{% endfor %}
{% endfor %}
{% if i < rows - 1 %}
                {{ "    " if channels }}x += down;
{% endif %}
{% endfor %}
{% if channels %}
                    weight += {{ rows * columns }};
                    plane += layer->plane_height * layer->plane_width;
                }
{% endif %}
{% for b in range(count) %}
                *y++ = y{{ b }} < lowest ? lowest : y{{ b }};
{% endfor %}
            }
{% endfor %}
        }
    }
}
