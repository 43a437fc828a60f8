{# Parameters: kernel; number, the type of the sums. #}
{% set fixed = number != "float" %}
/*
 * Products of x with rows of signs by lookup: the 16 sums of four inputs with all signs are computed once and serve all
 * rows. inputs is a multiple of 4.
 *
 * table holds a word for every 32 inputs and, there, every row: bits of the row's signs, 1 for +. memory holds 8 tables
 * of 16 sums.
 */
static void {{ name }}_{{ kernel }}(const uint32_t *table, const float *x, size_t inputs, size_t rows,
    {{ "int precision, " if fixed }}{{ number }} *memory, {{ number }} *sums{{ ", float *products" if fixed }})
{
    {{ number }} (*const lookup)[16] = ({{ number }}(*)[16])memory;
{% if fixed %}
    const {{ name }}_fixed_block block = {{ name }}_fixed_block_of(x, inputs, precision);
{% endif %}

    for (size_t start = 0; start < inputs; start += 32) {
        for (size_t k = 0; k < 8; ++k) {
            const size_t i = start + 4 * k;
            {{ number }} *const sum = lookup[k];

            if (i < inputs) {
{% for offset in range(4) %}
{% set input = "x[i + %d]" | format(offset) if offset else "x[i]" %}
                const {{ number }} x{{ offset }} = {{ "%s_fixed(%s, block.shift)" | format(name, input) if fixed else input }};
{% endfor %}
                const {{ number }} low_sum = x0 + x1;
                const {{ number }} low_difference = x0 - x1;
                const {{ number }} high_sum = x2 + x3;
                const {{ number }} high_difference = x2 - x3;

                sum[15] = low_sum + high_sum;
                sum[0] = -sum[15];
                sum[3] = low_sum - high_sum;
                sum[12] = -sum[3];
                sum[7] = low_sum + high_difference;
                sum[8] = -sum[7];
                sum[11] = low_sum - high_difference;
                sum[4] = -sum[11];
                sum[13] = low_difference + high_sum;
                sum[2] = -sum[13];
                sum[1] = low_difference - high_sum;
                sum[14] = -sum[1];
                sum[5] = low_difference + high_difference;
                sum[10] = -sum[5];
                sum[9] = low_difference - high_difference;
                sum[6] = -sum[9];
            } else {
                for (size_t b = 0; b < 16; ++b) {
                    sum[b] = 0;
                }
            }
        }
        for (size_t row = 0; row < rows; ++row) {
            const uint32_t signs = *table++;
            const {{ number }} low = lookup[0][signs & 15u] + lookup[1][signs >> 4 & 15u] + lookup[2][signs >> 8 & 15u]
                + lookup[3][signs >> 12 & 15u];
            const {{ number }} high = lookup[4][signs >> 16 & 15u] + lookup[5][signs >> 20 & 15u]
                + lookup[6][signs >> 24 & 15u] + lookup[7][signs >> 28];

            sums[row] = start == 0 ? low + high : sums[row] + (low + high);
        }
    }
{% if fixed %}
    for (size_t row = 0; row < rows; ++row) {
        products[row] = {{ name }}_fixed_result(sums[row], block);
    }
{% endif %}
}
