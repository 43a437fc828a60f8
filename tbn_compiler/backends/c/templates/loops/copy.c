{# Parameters: kernel; element, the C type. #}
static void {{ name }}_{{ kernel }}(const {{ element }} *x, {{ element }} *y, size_t size)
{
    memcpy(y, x, size * sizeof({{ element }}));
}
