{# One parameter after x for each name in parameters; expression gives y from x, an element. #}
/* y may be x. */
static void {{ name }}_{{ function }}(const float *x{% for parameter in parameters %}, float {{ parameter }}{% endfor %}, float *y, size_t size)
{
    for (size_t i = 0; i < size; ++i) {
        y[i] = {{ expression }};
    }
}
