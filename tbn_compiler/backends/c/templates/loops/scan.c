{# Parameters: kernel; element, the C type; title; start and step: how total takes in the element at. #}
/* The {{ title }} of each element and those before it, count elements that are inner apart. y may be x. */
static void {{ name }}_{{ kernel }}(const {{ element }} *x, {{ element }} *y, size_t outer, size_t count, size_t inner)
{
    for (size_t i = 0; i < outer * inner; ++i) {
        const {{ element }} *at = x + i / inner * count * inner + i % inner;
        {{ element }} *to = y + (at - x);
        {{ element }} total = {{ start }};

        for (size_t j = 0; j < count; ++j) {
            total = {{ step }};
            *to = total;
            at += inner;
            to += inner;
        }
    }
}
