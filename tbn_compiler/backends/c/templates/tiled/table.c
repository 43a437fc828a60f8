{# Parameters: kernel; arithmetic; strided, whether inputs are stride apart;
   whole, whether the number of inputs is a multiple of 4. #}
{% set fixed, block, floats = arithmetic == "fixed", arithmetic == "block", arithmetic == "float" %}
{% set converts = fixed or block %}
{% set number = "float" if floats else "int32_t" %}
{% set element = {"int8": "int8_t", "pair": "int32_t"}[arithmetic] | default("float") %}
{% set shift = "block.shift" if fixed else "shift" %}
/*
 * Products of x with rows of signs in little code: the 16 sums of four inputs with all signs are computed once and
 * serve all rows.
 *
 * table holds, for every 4 inputs, a byte for two rows: bits of the rows' signs, 1 for +, lower half first. So rows is
 * even{{ ", and inputs a multiple of 4" if whole else "; inputs beyond the last one count as 0" }}.
 */
static void {{ name }}_{{ kernel }}(const uint8_t *table, const {{ element }} *x, size_t inputs,{{ " size_t stride,\n   " if strided }} size_t rows,{{ " " if strided else "\n    " }}{{ "int precision, " if fixed else "const int32_t *block, " if block }}{{ number }} *sums{{ ", float *products" if fixed }})
{
{% if fixed %}
    const {{ name }}_fixed_block block = {{ name }}_fixed_block_of(x, inputs, precision);
{% elif block %}
    const int shift = block[0];
{% endif %}
{% if strided %}
    const size_t end = inputs * stride;
    size_t place = 0;
{% else %}
    const {{ element }} *const end = x + inputs;
{% endif %}
    {{ number }} lookup[16];
{% if not floats %}
    int first = 1;
{% endif %}

{% if floats %}
    /* Adding to minus zero is exact too, and unlike a loop of zeros this does not become a call of memset, which is
     * larger than the whole kernel. */
    for (size_t row = 0; row < rows; ++row) {
        sums[row] = -0.0f;
    }
{% endif %}
    while ({{ "place" if strided else "x" }} != end) {
        lookup[0] = 0;
        for (size_t half = 1; half < 16; half *= 2) {
{% set input = "x[place]" if strided else "*x++" %}
            const {{ number }} value = {{ ("place" if strided else "x") ~ " == end ? 0 : " if not whole }}{{ "%s_fixed(%s, %s)" | format(name, input, shift) if converts else input }};

            for (size_t b = 0; b < half; ++b) {
                lookup[b + half] = lookup[b] + value;
                lookup[b] -= value;
            }
{% if strided %}
            place += {{ "stride" if whole else "place == end ? 0 : stride" }};
{% endif %}
        }
        for ({{ number }} *sum = sums; sum != sums + rows; sum += 2) {
            const unsigned signs = *table++;

{% if not floats %}
            if (first) {
                sum[0] = 0;
                sum[1] = 0;
            }
{% endif %}
            sum[0] += lookup[signs & 15u];
            sum[1] += lookup[signs >> 4];
        }
{% if not floats %}
        first = 0;
{% endif %}
    }
{% if fixed %}
    for (size_t row = 0; row < rows; ++row) {
        products[row] = {{ name }}_fixed_result(sums[row], block);
    }
{% endif %}
}
