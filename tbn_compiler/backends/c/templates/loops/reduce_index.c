{# Parameters: kernel; title; comparison; operand, the C type. #}
/* The index of the {{ title }} of count elements, inner apart; the first one of equal ones{{ ", or of NaN" if operand == "float" }}. */
static void {{ name }}_{{ kernel }}(const {{ operand }} *x, int32_t *y, size_t outer, size_t count, size_t inner)
{
    for (size_t i = 0; i < outer * inner; ++i) {
        const {{ operand }} *const first = x + i / inner * count * inner + i % inner;
        size_t best = 0;

        for (size_t j = 1; j < count; ++j) {
            const {{ operand }} value = first[j * inner];
            const {{ operand }} extreme = first[best * inner];

{% if operand == "float" %}
            if (value {{ comparison }} extreme || (value != value && extreme == extreme)) {
{% else %}
            if (value {{ comparison }} extreme) {
{% endif %}
                best = j;
            }
        }
        y[i] = (int32_t)best;
    }
}
