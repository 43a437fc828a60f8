{# Parameters: as for binary.c. #}
/* The loops' strides tell which elements of a and b meet{{ "; y may be one of them if that is not repeated" if operand == result }}.{{ note }} */
static void {{ name }}_{{ kernel }}(const {{ name }}_nest3 *loops, const {{ operand }} *a, const {{ operand }} *b, {{ result }} *y)
{
    size_t index[6] = {0, 0, 0, 0, 0, 0};
    size_t d;

    do {
        *y = {{ expression | replace("a[i]", "*a") | replace("b[i]", "*b") | replace("@", name ~ "_") }};
{% set moved = ["a", "b", "y"] %}
{% include "loops/advance.c" %}
