{# Parameters: kernel; arithmetic; strided, whether inputs are stride apart;
   groups of inputs, 1, 2, 4 or 8, with products of their own. #}
{% set fixed, block, floats = arithmetic == "fixed", arithmetic == "block", arithmetic == "float" %}
{% set converts = fixed or block %}
{% set number = "float" if floats else "int32_t" %}
{% set element = {"int8": "int8_t", "pair": "int32_t"}[arithmetic] | default("float") %}
{% set shift = "block.shift" if fixed else "shift" %}
/*
 * Products of x with rows of signs by lookup: the 16 sums of four inputs with all signs are computed once and serve all
{% if groups > 1 %}
 * rows. x is {{ groups }} groups of inputs, {{ "which alternate" if strided else "one behind the other" }}; inputs, of each group, is a multiple of 4. The products of the
 * groups are apart, one group behind the other.
 *
 * table holds a word for every {{ 32 // groups }} inputs of each group and, there, every row: bits of the row's signs, 1 for +.
 * memory holds 8 tables of 16 sums.
{% else %}
 * rows. inputs is a multiple of 4.
 *
 * table holds a word for every 32 inputs and, there, every row: bits of the row's signs, 1 for +. memory holds 8 tables
 * of 16 sums.
{% endif %}
 */
static void {{ name }}_{{ kernel }}(const uint32_t *table, const {{ element }} *x, size_t inputs,{{ " size_t stride,\n   " if strided }} size_t rows,{{ " " if strided else "\n    " }}{{ "int precision, " if fixed else "const int32_t *block, " if block }}{{ number }} *memory, {{ number }} *sums{{ ", float *products" if fixed }})
{
    {{ number }} (*const lookup)[16] = ({{ number }}(*)[16])memory;
{% if fixed %}
    const {{ name }}_fixed_block block = {{ name }}_fixed_block_of(x, inputs, precision);
{% elif block %}
    const int shift = block[0];
{% endif %}

    for (size_t start = 0; start < inputs; start += {{ 32 // groups }}) {
        for (size_t k = 0; k < 8; ++k) {
{% if groups == 1 %}
            const size_t i = start + 4 * k;
{% elif groups == 8 %}
            const size_t i = start;
{% else %}
            const size_t i = start + 4 * (k % {{ 8 // groups }});
{% endif %}
            {{ number }} *const sum = lookup[k];

            if (i < inputs) {
{% set group = "k" if groups == 8 else "k / %d" | format(8 // groups) %}
{% if strided %}
                const float *const next = x + i * stride{{ " + " ~ group if groups > 1 }};
{% elif groups > 1 %}
                const float *const next = x + {{ group }} * inputs + i;
{% endif %}
{% for offset in range(4) %}
{% if strided %}
{% set input = "next[%s]" | format(["0", "stride", "2 * stride", "3 * stride"][offset]) %}
{% elif groups > 1 %}
{% set input = "next[%d]" | format(offset) %}
{% else %}
{% set input = "x[i + %d]" | format(offset) if offset else "x[i]" %}
{% endif %}
                const {{ number }} x{{ offset }} = {{ "%s_fixed(%s, %s)" | format(name, input, shift) if converts else input }};
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
{% if groups > 1 %}
            {{ number }} *const sum = sums + row;
{% for group in range(groups) %}
            const {{ number }} z{{ group }} = {% for k in range(group * 8 // groups, (group + 1) * 8 // groups) %}
{{ " + " if not loop.first }}lookup[{{ k }}][signs{{ " >> %d" | format(4 * k) if k }}{{ " & 15u" if k < 7 }}]
{%- endfor %};
{% endfor %}

{% for group in range(groups) %}
{% set place = "0" if group == 0 else "rows" if group == 1 else "%d * rows" | format(group) %}
            sum[{{ place }}] = start == 0 ? z{{ group }} : sum[{{ place }}] + z{{ group }};
{% endfor %}
{% else %}
            const {{ number }} low = lookup[0][signs & 15u] + lookup[1][signs >> 4 & 15u] + lookup[2][signs >> 8 & 15u]
                + lookup[3][signs >> 12 & 15u];
            const {{ number }} high = lookup[4][signs >> 16 & 15u] + lookup[5][signs >> 20 & 15u]
                + lookup[6][signs >> 24 & 15u] + lookup[7][signs >> 28];

            sums[row] = start == 0 ? low + high : sums[row] + (low + high);
{% endif %}
        }
    }
{% if fixed %}
    for (size_t row = 0; row < rows; ++row) {
        products[row] = {{ name }}_fixed_result(sums[row], block);
    }
{% endif %}
}
