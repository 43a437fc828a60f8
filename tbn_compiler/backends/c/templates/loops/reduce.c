{# start and step: how value takes in an element; last: what is stored. operand and result: the C types. #}
/* {{ title }} of count elements, inner apart{{ note }}. */
static void {{ name }}_{{ kernel }}(const {{ operand }} *x, {{ result }} *y, size_t outer, size_t count, size_t inner)
{
    for (size_t i = 0; i < outer * inner; ++i) {
        const {{ operand }} *const first = x + i / inner * count * inner + i % inner;
        {{ result }} value = {{ start }};

        for (size_t j = 0; j < count; ++j) {
            {{ step }}
        }
        y[i] = {{ last }};
    }
}
