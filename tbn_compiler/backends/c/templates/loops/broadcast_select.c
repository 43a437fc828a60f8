{# Parameters: kernel; element, the C type. #}
/* Elements of a where the byte in shown is not 0, else of b; the loops' strides tell which ones meet. */
static void {{ name }}_{{ kernel }}(const {{ name }}_nest4 *loops, const uint8_t *shown, const {{ element }} *a, const {{ element }} *b,
    {{ element }} *y)
{
    size_t index[6] = {0, 0, 0, 0, 0, 0};
    size_t d;

    do {
        *y = *shown != 0 ? *a : *b;
{% set moved = ["shown", "a", "b", "y"] %}
{% include "loops/advance.c" %}
