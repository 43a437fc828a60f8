{# Parameters: kernel; element, the C type. #}
/* Copies blocks of size elements, one behind the other in x, to places of y that are stride apart. */
static void {{ name }}_{{ kernel }}(const {{ element }} *x, {{ element }} *y, size_t blocks, size_t size, size_t stride)
{
    for (size_t i = 0; i < blocks; ++i) {
        memcpy(y + i * stride, x + i * size, size * sizeof({{ element }}));
    }
}
