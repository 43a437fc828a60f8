{# Parameters: kernel; element, the C type; sign, what is done to an element. #}
/* Each element of x, in the loops' order, {{ "is added to" if sign == "+=" else "becomes" }} the one of so many elements of y, a stride apart, that its index names. */
static void {{ name }}_{{ kernel }}(const {{ name }}_nest2 *loops, const int32_t *indices, const {{ element }} *x, size_t rows,
    size_t stride, {{ element }} *y)
{
    size_t index[6] = {0, 0, 0, 0, 0, 0};
    size_t d;

    do {
        y[{{ name }}_row_of(*indices++, rows) * stride] {{ sign }} *x;
        for (d = 6; d-- > 0;) {
            x += loops->x[d];
            y += loops->y[d];
            if (++index[d] < loops->size[d]) {
                break;
            }
            /* The dimension is done: back to its begin, and on to the next outer one. */
            index[d] = 0;
            x -= loops->x[d] * (ptrdiff_t)loops->size[d];
            y -= loops->y[d] * (ptrdiff_t)loops->size[d];
        }
    } while (d < 6);
}
