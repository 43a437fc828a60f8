{# Parameters: kernel; element, the C type; sign, what is done to an element. #}
/* Each element of x, in the loops' order, {{ "is added to" if sign == "+=" else "becomes" }} the one of so many elements of y, a stride apart, that its index names. */
static void {{ name }}_{{ kernel }}(const {{ name }}_nest2 *loops, const int32_t *indices, const {{ element }} *x, size_t rows,
    size_t stride, {{ element }} *y)
{
    size_t index[6] = {0, 0, 0, 0, 0, 0};
    size_t d;

    do {
        y[{{ name }}_row_of(*indices++, rows) * stride] {{ sign }} *x;
{% set moved = ["x", "y"] %}
{% include "loops/advance.c" %}
