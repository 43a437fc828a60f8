{# needs: requantize #}
/* The mean of count elements, inner apart, as int8 with a scale of its own. */
static void {{ name }}_int8_mean_int8(const int8_t *x, int32_t factor, int32_t multiplier, int shift, int32_t low, int32_t high,
    int8_t *y, size_t outer, size_t count, size_t inner)
{
    const int32_t half = (int32_t)1 << shift >> 1;

    for (size_t i = 0; i < outer * inner; ++i) {
        const int8_t *const first = x + i / inner * count * inner + i % inner;
        int32_t sum = 0;

        for (size_t j = 0; j < count; ++j) {
            sum += first[j * inner];
        }
        y[i] = {{ name }}_requantize(sum * factor, multiplier, half, shift, low, high);
    }
}
