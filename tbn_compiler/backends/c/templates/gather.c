{# headers: stdint.h, string.h #}
/* The rows of a table that the indices name. An index out of range reads the last row. */
static void {{ name }}_gather(const int32_t *indices, const float *table, float *y, size_t count, size_t rows,
    size_t columns)
{
    for (size_t i = 0; i < count; ++i) {
        const size_t index = (size_t)indices[i];
        const size_t row = index < rows ? index : rows - 1;

        memcpy(y + i * columns, table + row * columns, columns * sizeof(float));
    }
}
