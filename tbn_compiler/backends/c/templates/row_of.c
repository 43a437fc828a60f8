{# headers: stdint.h #}
/* The row that an index names; negative ones count from the end. One that is out of range names the last row. */
static size_t {{ name }}_row_of(int32_t index, size_t rows)
{
    const size_t row = index < 0 ? (size_t)index + rows : (size_t)index;

    return row < rows ? row : rows - 1;
}
