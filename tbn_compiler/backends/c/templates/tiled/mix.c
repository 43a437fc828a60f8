{# Parameters: kernel; groups, a power of two. #}
{% set stages = [1, 2, 4, 8] | select("lt", groups) | list %}
{% set letters = "zabcd" %}
{% set last = letters[stages | length] %}
/* {{ name }}_tiled_mix for {{ groups }} column groups. y may be products, if there is one position and stride is rows. */
static void {{ name }}_{{ kernel }}(const {{ name }}_tiled_mix_layer *layer, const float *products, size_t position, float *y)
{
    const size_t stride = layer->stride;
    const size_t next = layer->rows * layer->positions; /* from an output to that of the next copy */
    const size_t alpha_next = layer->alpha_per_copy;
    const float *alpha = layer->alpha;
    const float *bias = layer->bias;

    y += position / layer->positions * next * {{ groups }} + position % layer->positions;
    for (size_t row = 0; row < layer->rows; ++row) {
{% for group in range(groups) %}
        const float z{{ group }} = products[{{ "0" if group == 0 else "stride" if group == 1 else "%d * stride" | format(group) }}];
{% endfor %}
{% for half in stages %}
{% set from, to = letters[loop.index0], letters[loop.index] %}
{% for i in range(groups) %}
        {{ "float" if half == stages[-1] else "const float" }} {{ to }}{{ i }} = {{ from }}{{ i - half if i // half % 2 else i }} {{ "-" if i // half % 2 else "+" }} {{ from }}{{ i if i // half % 2 else i + half }};
{% endfor %}
{% endfor %}

        if (alpha != NULL) {
{% for i in range(groups) %}
            {{ last }}{{ i }} *= alpha[{{ "0" if i == 0 else "alpha_next" if i == 1 else "%d * alpha_next" | format(i) }}];
{% endfor %}
            alpha += layer->alpha_per_row;
        }
        if (bias != NULL) {
{% for i in range(groups) %}
            {{ last }}{{ i }} += bias[{{ "0" if i == 0 else "layer->rows" if i == 1 else "%d * layer->rows" | format(i) }}];
{% endfor %}
            ++bias;
        }
{% for i in range(groups) %}
        y[{{ "0" if i == 0 else "next" if i == 1 else "%d * next" | format(i) }}] = {{ name }}_activate({{ last }}{{ i }}, layer->relu);
{% endfor %}
        ++products;
        y += layer->positions;
    }
}
