{# Parameters: kernel; arithmetic; strided, whether inputs are stride apart;
   bits, rows that share a bucket; lanes, buckets that an input goes to. #}
{% set fixed, block, floats = arithmetic == "fixed", arithmetic == "block", arithmetic == "float" %}
{% set converts = fixed or block %}
{% set number = "float" if floats else "int32_t" %}
{% set element = {"int8": "int8_t", "pair": "int32_t"}[arithmetic] | default("float") %}
{% set shift = "block.shift" if fixed else "shift" %}
{% set skip = plan.options.skip_zeros %}
{% set whole_bytes = bits * lanes % 8 == 0 %}
{% if skip or converts %}
{% set unroll = 1 if whole_bytes else 2 %}
{% else %}
{% set unroll = 8 if lanes <= 2 else 4 if lanes <= 4 else 2 %}
{% endif %}
{% macro number_of(index) -%}
{% if bits == 8 %}table[{{ index }}]{% else %}table[{{ index // 2 }}] {{ ">> 4" if index % 2 else "& 15" }}{% endif %}
{%- endmacro %}
{% macro add(offset) %}
{% set input = "x[place]" if strided else "next[%d]" | format(offset) %}
            {
                const {{ number }} value = {{ "%s_fixed(%s, %s)" | format(name, input, shift) if converts else input }};

{% if skip %}
                if (value != 0) {
{% endif %}
{% for lane in range(lanes) %}
                {{ "    " if skip }}{{ "memory" if lanes == 1 else "buckets" }}[{{ number_of(offset * lanes + lane) }}]{{ "[%d]" | format(lane) if lanes > 1 }} += value;
{% endfor %}
{% if skip %}
                }
{% endif %}
{% if strided %}
                place += stride;
{% endif %}
            }
{% endmacro %}
/*
 * Products of x with rows of signs, {{ bits * lanes }} rows in a pass. {{ bits }} rows share {{ 2 ** bits }} buckets: the signs that the rows have for an
 * input, 1 for +, are the number of the bucket that the input is added to, so that one addition serves {{ bits }} rows. At the
 * end a row's product is the sum of all buckets, each with the sign of the row's bit in its number.
 *
 * table holds those {{ bits }}-bit numbers by pass, input{{ " and group of rows" if lanes > 1 }}{{ ", lower half of a byte first" if bits == 4 }}.
 */
static void {{ name }}_{{ kernel }}_fold(const {{ number }} *bucket, {{ number }} *sums)
{
{% if bits == 8 %}
    /* Bucket 255 - b has the opposite signs of bucket b. Their differences form a square of high and low bits of b. */
    const {{ number }} *opposite = bucket + {{ 255 * lanes }};
    {{ number }} rows[8];
    {{ number }} columns[8];
{% if floats or plan.options.processor.few_registers %}
{% for column in range(16) %}
    {{ number }} column{{ column }} = 0;
{% endfor %}

    for (size_t high = 0; high < 8; ++high) {
        {{ number }} difference;
        {{ number }} row = 0;

{% for column in range(16) %}
        difference = bucket[{{ lanes * column }}] - opposite[{{ "-" if column }}{{ lanes * column }}];
        column{{ column }} += difference;
        row += difference;
{% endfor %}
        rows[high] = row;
        bucket += {{ 16 * lanes }};
        opposite -= {{ 16 * lanes }};
    }
{% for column in range(8) %}
    columns[{{ column }}] = column{{ column }} - column{{ 15 - column }};
{% endfor %}
{% else %}
    int32_t all[16];
{% for high in range(8) %}
    int32_t row{{ high }} = 0;
{% endfor %}

    /* Eight sums for the rows fit in registers, sixteen for the columns do not. */
    for (size_t low = 0; low < 16; ++low, bucket += {{ lanes }}, opposite -= {{ lanes }}) {
        int32_t difference;
        int32_t column = 0;

{% for high in range(8) %}
        difference = bucket[{{ 16 * lanes * high }}] - opposite[{{ "-" if high }}{{ 16 * lanes * high }}];
        row{{ high }} += difference;
        column += difference;
{% endfor %}
        all[low] = column;
    }
{% for high in range(8) %}
    rows[{{ high }}] = row{{ high }};
{% endfor %}
    for (size_t low = 0; low < 8; ++low) {
        columns[low] = all[low] - all[15 - low];
    }
{% endif %}
    {{ name }}_{{ signed_sums }}(columns, sums);
    {{ name }}_{{ signed_sums }}(rows, sums + 4);
{% else %}
    /* Bucket 15 - b has the opposite signs of bucket b. */
    {{ number }} differences[8];

    for (size_t b = 0; b < 8; ++b) {
{% if lanes == 1 %}
        differences[b] = bucket[b] - bucket[15 - b];
{% else %}
        differences[b] = bucket[b * {{ lanes }}] - bucket[(15 - b) * {{ lanes }}];
{% endif %}
    }
    {{ name }}_{{ signed_sums }}(differences, sums);
{% endif %}
}

static void {{ name }}_{{ kernel }}(const uint8_t *table, const {{ element }} *x, size_t inputs,{{ " size_t stride,\n   " if strided }} size_t passes,{{ " " if strided else "\n    " }}{{ "int precision, " if fixed else "const int32_t *block, " if block }}{{ number }} *memory, {{ "float" if floats or fixed else "int32_t" }} *products)
{
{% if lanes > 1 %}
    typedef {{ number }} bucket_of_each[{{ lanes }}]; /* group of rows */
    bucket_of_each *const buckets = (bucket_of_each *)memory;
{% endif %}
{% if fixed %}
    const {{ name }}_fixed_block block = {{ name }}_fixed_block_of(x, inputs, precision);
{% elif block %}
    const int shift = block[0];
{% endif %}

    for (; passes != 0; --passes) {
{% if lanes == 1 and fixed %}
        int32_t sums[{{ bits }}];
{% endif %}
        {{ "size_t place = 0" if strided else "const %s *next = x" | format(element) }};

{% if 2 ** bits * lanes == 16 %}
{% for b in range(16) %}
        memory[{{ b }}] = 0;
{% endfor %}
{% else %}
        for ({{ number }} *bucket = memory; bucket != memory + {{ 2 ** bits * lanes }}; bucket += 16) {
{% for b in range(16) %}
            bucket[{{ b }}] = 0;
{% endfor %}
        }
{% endif %}
        for (size_t count = inputs{{ " / %d" | format(unroll) if unroll > 1 }}; count != 0; --count) {
{% for offset in range(unroll) %}
{{ add(offset) }}{% endfor %}
{% if not strided %}
            next += {{ unroll }};
{% endif %}
            table += {{ unroll * bits * lanes // 8 }};
        }
{% if unroll > 1 and whole_bytes %}
        for (size_t count = inputs % {{ unroll }}; count != 0; --count) {
{{ add(0) }}{{ "            ++next;\n" if not strided }}            table += {{ bits * lanes // 8 }};
        }
{% elif unroll > 1 %}
{% if unroll > 2 %}
        for (size_t count = inputs % {{ unroll }} / 2; count != 0; --count) {
{{ add(0) }}{{ add(1) }}{{ "            next += 2;\n" if not strided }}            table += {{ bits * lanes // 4 }};
        }
{% endif %}
        if (inputs % 2 != 0) {
{{ add(0) }}            table += {{ (bits * lanes + 7) // 8 }};
        }
{% endif %}
{% if lanes == 1 and fixed %}
        {{ name }}_{{ kernel }}_fold(memory, sums);
        for (size_t row = 0; row < {{ bits }}; ++row) {
            *products++ = {{ name }}_fixed_result(sums[row], block);
        }
{% elif lanes == 1 %}
        {{ name }}_{{ kernel }}_fold(memory, products);
        products += {{ bits }};
{% elif fixed %}
        for (size_t lane = 0; lane < {{ lanes }}; ++lane) {
            int32_t sums[{{ bits }}];

            {{ name }}_{{ kernel }}_fold(memory + lane, sums);
            for (size_t row = 0; row < {{ bits }}; ++row) {
                *products++ = {{ name }}_fixed_result(sums[row], block);
            }
        }
{% else %}
        for (size_t lane = 0; lane < {{ lanes }}; ++lane) {
            {{ name }}_{{ kernel }}_fold(memory + lane, products);
            products += {{ bits }};
        }
{% endif %}
    }
}
