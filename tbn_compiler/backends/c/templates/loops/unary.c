{# Parameters: kernel; operand and result, the C types; expression gives y from x, an element; parameters, names of numbers. #}
/* {{ "y may be x." if operand == result else "Each element of x as the result's type." if kernel.startswith("to_") else "For each element." }}{{ note }} */
static void {{ name }}_{{ kernel }}(const {{ operand }} *x{% for parameter in parameters %}, {{ operand }} {{ parameter }}{% endfor %}, {{ result }} *y, size_t size)
{
    for (size_t i = 0; i < size; ++i) {
        y[i] = {{ expression | replace("@", name ~ "_") }};
    }
}
