{# Parameters: kernel; element, the C type. #}
static void {{ name }}_{{ kernel }}({{ element }} value, {{ element }} *y, size_t size)
{
    for (size_t i = 0; i < size; ++i) {
        y[i] = value;
    }
}
