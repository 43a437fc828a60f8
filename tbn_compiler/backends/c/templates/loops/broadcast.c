{# Parameters: as for binary.c. #}
/* The loops' strides tell which elements of a and b meet{{ "; y may be one of them if that is not repeated" if operand == result }}.{{ note }} */
static void {{ name }}_{{ kernel }}(const {{ name }}_nest3 *loops, const {{ operand }} *a, const {{ operand }} *b, {{ result }} *y)
{
    size_t index[6] = {0, 0, 0, 0, 0, 0};
    size_t d;

    do {
        *y = {{ expression | replace("a[i]", "*a") | replace("b[i]", "*b") | replace("@", name ~ "_") }};
        for (d = 6; d-- > 0;) {
            a += loops->a[d];
            b += loops->b[d];
            y += loops->y[d];
            if (++index[d] < loops->size[d]) {
                break;
            }
            /* The dimension is done: back to its begin, and on to the next outer one. */
            index[d] = 0;
            a -= loops->a[d] * (ptrdiff_t)loops->size[d];
            b -= loops->b[d] * (ptrdiff_t)loops->size[d];
            y -= loops->y[d] * (ptrdiff_t)loops->size[d];
        }
    } while (d < 6);
}
