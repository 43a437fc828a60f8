{# Parameters: kernel; element, the C type. #}
/* Copies the elements of x that the loops name to those of y. */
static void {{ name }}_{{ kernel }}(const {{ name }}_nest2 *loops, const {{ element }} *x, {{ element }} *y)
{
    size_t index[6] = {0, 0, 0, 0, 0, 0};
    size_t d;

    do {
        *y = *x;
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
