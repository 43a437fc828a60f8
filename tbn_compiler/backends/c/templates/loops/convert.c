{# Parameters: kernel; element and result, the C types. #}
static void {{ name }}_{{ kernel }}(const {{ element }} *x, {{ result }} *y, size_t size)
{
    for (size_t i = 0; i < size; ++i) {
        y[i] = {{ "(float)" if result == "float" }}x[i];
    }
}
