{# headers: stdint.h #}
/* The sum of two arrays with scales of their own: the factors are these, over that of the result, times 2^shift. */
static void {{ name }}_int8_sum(const int8_t *a, const int8_t *b, int32_t factor_a, int32_t factor_b, int shift, int32_t low, int32_t high,
    int8_t *y, size_t size)
{
    const int32_t half = (int32_t)1 << shift >> 1;

    for (size_t i = 0; i < size; ++i) {
        int32_t value = (a[i] * factor_a + b[i] * factor_b + half) >> shift;

        value = value > low ? value : low;
        value = value < high ? value : high;
        y[i] = (int8_t)value;
    }
}
