{# Parameters: kernel; element, the C type. #}
/* For each result, in the loops' order, the one of so many elements of x, a stride apart, that its index names. */
static void {{ name }}_{{ kernel }}(const {{ name }}_nest2 *loops, const int32_t *indices, const {{ element }} *x, size_t rows,
    size_t stride, {{ element }} *y)
{
    size_t index[6] = {0, 0, 0, 0, 0, 0};
    size_t d;

    do {
        *y++ = x[{{ name }}_row_of(*indices++, rows) * stride];
{% set moved = ["x"] %}
{% include "loops/advance.c" %}
