{# Parameters: number, the type of elements; value, the next one of integers; parameter, further ones of the function. #}
{% set fixed = number != "float" %}
/* Images of a group of channels with zeros around them{{ ", as integers of one block" if fixed }}. The zeros are written with index 0. */
static void {{ name }}_tiled_{{ "fixed_" if fixed }}planes(const {{ name }}_tiled_filter_layer *layer, const {{ name }}_window *window,
    size_t index, const float *x, {{ parameter }}{{ number }} *planes)
{
    const size_t size = layer->plane_height * layer->plane_width;
    const size_t width = window->input_width;
{% if fixed %}
    const size_t inputs = layer->channels * window->input_height * width;
    const {{ name }}_fixed_block all = {{ name }}_fixed_block_of(x, inputs, precision);

    block[0] = all.exponent;
    block[1] = (int32_t){{ name }}_float_bits(all.scale);
{% endif %}

    if (index == 0) {
        for (size_t i = 0; i < layer->channels * size; ++i) {
            planes[i] = 0;
        }
    }
    planes += window->padding_height * layer->plane_width + window->padding_width;
    for (size_t channel = 0; channel < layer->channels; ++channel, planes += size) {
        {{ number }} *line = planes;

        for (size_t rows = window->input_height; rows != 0; --rows, line += layer->plane_width) {
            {{ number }} *to = line;

{% if fixed %}
            for (size_t count = width; count != 0; --count) {
                *to++ = {{ value }};
            }
{% else %}
            for (size_t count = width / 4; count != 0; --count, to += 4, x += 4) {
{% for i in range(4) %}
                to[{{ i }}] = x[{{ i }}];
{% endfor %}
            }
            for (size_t count = width % 4; count != 0; --count) {
                *to++ = *x++;
            }
{% endif %}
        }
    }
}
