{# start and step: how value takes in an element; result: what is stored. #}
/* {{ title }} of count elements, inner apart{{ note | default("") }}. */
static void {{ name }}_reduce_{{ function }}(const float *x, float *y, size_t outer, size_t count, size_t inner)
{
    for (size_t i = 0; i < outer * inner; ++i) {
        const float *const first = x + i / inner * count * inner + i % inner;
        float value = {{ start }};

        for (size_t j = 0; j < count; ++j) {
            {{ step }}
        }
        y[i] = {{ result | default("value") }};
    }
}
