{# Parameters: kernel; element, the C type; index, the place in the table that an element has. #}
/* A function of each element by its 256 results.{{ " y may be x." if element == "int8_t" }} */
static void {{ name }}_{{ kernel }}(const {{ element }} *x, const int8_t *table, int8_t *y, size_t size)
{
    for (size_t i = 0; i < size; ++i) {
        y[i] = table[x[i]{{ index }}];
    }
}
