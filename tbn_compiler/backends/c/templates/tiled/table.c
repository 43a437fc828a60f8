{# Parameters: kernel; number, the type of the sums; whole, whether the number of inputs is a multiple of 4. #}
{% set fixed = number != "float" %}
/*
 * Products of x with rows of signs in little code: the 16 sums of four inputs with all signs are computed once and
 * serve all rows.
 *
 * table holds, for every 4 inputs, a byte for two rows: bits of the rows' signs, 1 for +, lower half first. So rows is
 * even{{ ", and inputs a multiple of 4" if whole else "; inputs beyond the last one count as 0" }}.
 */
static void {{ name }}_{{ kernel }}(const uint8_t *table, const float *x, size_t inputs, size_t rows,
    {{ "int precision, " if fixed }}{{ number }} *sums{{ ", float *products" if fixed }})
{
{% if fixed %}
    const {{ name }}_fixed_block block = {{ name }}_fixed_block_of(x, inputs, precision);
{% endif %}
    const float *const end = x + inputs;
    {{ number }} lookup[16];
{% if fixed %}
    int first = 1;
{% endif %}

{% if not fixed %}
    /* Adding to minus zero is exact too, and unlike a loop of zeros this does not become a call of memset, which is
     * larger than the whole kernel. */
    for (size_t row = 0; row < rows; ++row) {
        sums[row] = -0.0f;
    }
{% endif %}
    while (x != end) {
        lookup[0] = 0;
        for (size_t half = 1; half < 16; half *= 2) {
            const {{ number }} value = {{ "x == end ? 0 : " if not whole }}{{ "%s_fixed(*x++, block.shift)" | format(name) if fixed else "*x++" }};

            for (size_t b = 0; b < half; ++b) {
                lookup[b + half] = lookup[b] + value;
                lookup[b] -= value;
            }
        }
        for ({{ number }} *sum = sums; sum != sums + rows; sum += 2) {
            const unsigned signs = *table++;

{% if fixed %}
            if (first) {
                sum[0] = 0;
                sum[1] = 0;
            }
{% endif %}
            sum[0] += lookup[signs & 15u];
            sum[1] += lookup[signs >> 4];
        }
{% if fixed %}
        first = 0;
{% endif %}
    }
{% if fixed %}
    for (size_t row = 0; row < rows; ++row) {
        products[row] = {{ name }}_fixed_result(sums[row], block);
    }
{% endif %}
}
