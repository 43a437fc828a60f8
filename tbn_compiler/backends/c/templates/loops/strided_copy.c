{# Parameters: kernel; element, the C type; index, behind an element its place in a table, or none: elements are copied. #}
{% if index is none %}
/* Copies the elements of x that the loops name to those of y. */
static void {{ name }}_{{ kernel }}(const {{ name }}_nest2 *loops, const {{ element }} *x, {{ element }} *y)
{% else %}
/* A function, by its 256 results, of the elements of x that the loops name. */
static void {{ name }}_{{ kernel }}(const {{ name }}_nest2 *loops, const {{ element }} *x, const int8_t *table, int8_t *y)
{% endif %}
{
    size_t index[6] = {0, 0, 0, 0, 0, 0};
    size_t d;

    do {
        *y = {{ "*x" if index is none else "table[*x" ~ index ~ "]" }};
{% set moved = ["x", "y"] %}
{% include "loops/advance.c" %}
