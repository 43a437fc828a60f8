{# Parameters: kernel; element, the C type. #}
/* Elements of a where the byte in shown is not 0, else of b; the loops' strides tell which ones meet. */
static void {{ name }}_{{ kernel }}(const {{ name }}_nest4 *loops, const uint8_t *shown, const {{ element }} *a, const {{ element }} *b,
    {{ element }} *y)
{
    size_t index[6] = {0, 0, 0, 0, 0, 0};
    size_t d;

    do {
        *y = *shown != 0 ? *a : *b;
        for (d = 6; d-- > 0;) {
            shown += loops->shown[d];
            a += loops->a[d];
            b += loops->b[d];
            y += loops->y[d];
            if (++index[d] < loops->size[d]) {
                break;
            }
            /* The dimension is done: back to its begin, and on to the next outer one. */
            index[d] = 0;
            shown -= loops->shown[d] * (ptrdiff_t)loops->size[d];
            a -= loops->a[d] * (ptrdiff_t)loops->size[d];
            b -= loops->b[d] * (ptrdiff_t)loops->size[d];
            y -= loops->y[d] * (ptrdiff_t)loops->size[d];
        }
    } while (d < 6);
}
