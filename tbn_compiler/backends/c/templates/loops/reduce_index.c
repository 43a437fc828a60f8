/* The index of the {{ title }} of count elements, inner apart; the first one of equal ones, or of NaN. */
static void {{ name }}_reduce_{{ function }}(const float *x, int32_t *y, size_t outer, size_t count, size_t inner)
{
    for (size_t i = 0; i < outer * inner; ++i) {
        const float *const first = x + i / inner * count * inner + i % inner;
        size_t best = 0;

        for (size_t j = 1; j < count; ++j) {
            const float value = first[j * inner];
            const float extreme = first[best * inner];

            if (value {{ comparison }} extreme || (value != value && extreme == extreme)) {
                best = j;
            }
        }
        y[i] = (int32_t)best;
    }
}
