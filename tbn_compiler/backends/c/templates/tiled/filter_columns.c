{# Parameters: kernel; columns, the width of filters; stride, from column to column of the output. #}
/* {{ name }}_tiled_filter for filters of {{ columns }} neighbouring columns{{ " with a stride of %d" | format(stride) if stride > 1 }}. */
static void {{ name }}_{{ kernel }}(const {{ name }}_tiled_filter_layer *layer, const {{ name }}_window *window,
    const uint8_t *signs, const float *planes, size_t index, float *weights, float *y)
{
{% include "tiled/filter_start.c" %}
            size_t left = window->output_width;

{% for count in (8, 4, 1) %}
{% if count > 1 %}
            for (; left >= {{ count }}; left -= {{ count }}, line += {{ count * stride }}) {
{% else %}
            for (; left != 0; --left, line += {{ stride }}) {
{% endif %}
                const float *weight = weights;
                const float *plane = line;
{% for b in range(count) %}
                float y{{ b }} = bias;
{% endfor %}

                for (size_t channel = layer->channels; channel != 0; --channel) {
                    const float *x = plane;

                    for (size_t i = window->kernel_height; i != 0; --i) {
{% for j in range(columns) %}
{% for b in range(count) %}
                        y{{ b }} += weight[{{ j }}] * x[{{ b * stride + j }}];
{% endfor %}
{% endfor %}
                        weight += {{ columns }};
                        x += window->dilation_height * layer->plane_width;
                    }
                    plane += layer->plane_height * layer->plane_width;
                }
{% for b in range(count) %}
                *y++ = y{{ b }} < lowest ? lowest : y{{ b }};
{% endfor %}
            }
{% endfor %}
        }
    }
}
