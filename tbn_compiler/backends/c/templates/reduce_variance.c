/* The variance of count elements, inner apart: the squares of what they differ from their mean by, over a divisor. */
static void {{ name }}_reduce_variance(const float *x, float divisor, float *y, size_t outer, size_t count, size_t inner)
{
    for (size_t i = 0; i < outer * inner; ++i) {
        const float *const first = x + i / inner * count * inner + i % inner;
        float sum = 0.0f;
        float squares = 0.0f;

        for (size_t j = 0; j < count; ++j) {
            sum += first[j * inner];
        }
        for (size_t j = 0; j < count; ++j) {
            const float rest = first[j * inner] - sum / (float)count;

            squares += rest * rest;
        }
        y[i] = squares / divisor;
    }
}
