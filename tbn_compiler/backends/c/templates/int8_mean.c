{# headers: stdint.h #}
/* The mean of count elements, inner apart, as float; scale is that of the input over count. */
static void {{ name }}_int8_mean(const int8_t *x, float scale, float *y, size_t outer, size_t count, size_t inner)
{
    for (size_t i = 0; i < outer * inner; ++i) {
        const int8_t *const first = x + i / inner * count * inner + i % inner;
        int32_t sum = 0;

        for (size_t j = 0; j < count; ++j) {
            sum += first[j * inner];
        }
        y[i] = (float)sum * scale;
    }
}
