{# Parameters: kernel; operand and result, the C types; expression gives y from a and b, elements. #}
/* {{ "y may be a or b." if operand == result else "For each pair of elements." }}{{ note }} */
static void {{ name }}_{{ kernel }}(const {{ operand }} *a, const {{ operand }} *b, {{ result }} *y, size_t size)
{
    for (size_t i = 0; i < size; ++i) {
        y[i] = {{ expression | replace("@", name ~ "_") }};
    }
}
