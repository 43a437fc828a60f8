{# Parameters: kernel; block, whether the products are integers of a block. #}
{% set number = "int32_t" if block else "float" %}
/* Mix the products of each row; then scale, bias and activation of each output. mixed holds a number for each group. */
static void {{ name }}_{{ kernel }}(const {{ name }}_tiled_mix_layer *layer, const {{ number }} *products, {{ "const int32_t *block,\n    " if block }}{{ number }} *mixed,{{ " " if block else "\n    " }}size_t position, float *y)
{
    const size_t groups = layer->groups;
{% if block %}
    {{ name }}_fixed_block all;

    all.shift = block[0];
    all.exponent = block[1];
    all.scale = {{ name }}_float_of_bits((uint32_t)block[2]);
{% else %}

{% endif %}
    y += position / layer->positions * layer->positions * layer->rows * groups + position % layer->positions;
    for (size_t row = 0; row < layer->rows; ++row) {
        for (size_t group = 0; group < groups; ++group) {
            mixed[group] = products[group * layer->stride + row];
        }
        for (size_t half = 1; half < groups; half *= 2) {
            for (size_t i = 0; i < groups; i += i % half == half - 1 ? half + 1 : 1) {
                const {{ number }} sum = mixed[i] + mixed[i + half];

                mixed[i + half] = mixed[i] - mixed[i + half];
                mixed[i] = sum;
            }
        }
        for (size_t copy = 0; copy < groups; ++copy) {
            const size_t output = copy * layer->rows + row;
            float value = {{ "%s_fixed_result(mixed[copy], all)" | format(name) if block else "mixed[copy]" }};

            if (layer->alpha != NULL) {
                value *= layer->alpha[row * layer->alpha_per_row + copy * layer->alpha_per_copy];
            }
            if (layer->bias != NULL) {
                value += layer->bias[output];
            }
            y[output * layer->positions] = {{ name }}_activate(value, layer->relu);
        }
    }
}
