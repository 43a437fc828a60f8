{# Parameters: kernel; element, the C type. #}
/* The rows that the indices name of each of the tables, which follow one another. */
static void {{ name }}_{{ kernel }}(const int32_t *indices, const {{ element }} *table, {{ element }} *y, size_t tables, size_t count,
    size_t rows, size_t columns)
{
    for (size_t t = 0; t < tables; ++t) {
        for (size_t i = 0; i < count; ++i) {
            memcpy(y, table + {{ name }}_row_of(indices[i], rows) * columns, columns * sizeof({{ element }}));
            y += columns;
        }
        table += rows * columns;
    }
}
