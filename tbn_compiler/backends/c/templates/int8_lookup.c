{# headers: stdint.h #}
/* A function of each element by its 256 results. y may be x. */
static void {{ name }}_int8_lookup(const int8_t *x, const int8_t *table, int8_t *y, size_t size)
{
    for (size_t i = 0; i < size; ++i) {
        y[i] = table[x[i] + 128];
    }
}
