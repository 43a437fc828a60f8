{# headers: stdint.h #}
/* Whether an element goes before another one: the larger, or the smaller; NaN counts as largest, of equal ones the first. */
static int {{ name }}_ranks_before(const float *x, size_t inner, int largest, size_t a, size_t b)
{
    const float value = x[a * inner];
    const float other = x[b * inner];

    if (value != value || other != other) {
        return (value == value) == (other == other) ? a < b : (value != value) == largest;
    }
    return value == other ? a < b : (value > other) == largest;
}

/* Where the first ranks of count elements stand, inner apart, in order: the largest first, or the smallest. */
static void {{ name }}_rank(const float *x, int largest, size_t ranks, int32_t *y, size_t outer, size_t count, size_t inner)
{
    for (size_t i = 0; i < outer * inner; ++i) {
        const float *const first = x + i / inner * count * inner + i % inner;
        int32_t *const result = y + i / inner * ranks * inner + i % inner;
        size_t last = count;

        for (size_t rank = 0; rank < ranks; ++rank) {
            size_t best = count;

            /* The one that goes before all others behind the last one. */
            for (size_t j = 0; j < count; ++j) {
                if ((rank == 0 || {{ name }}_ranks_before(first, inner, largest, last, j))
                    && (best == count || {{ name }}_ranks_before(first, inner, largest, j, best))) {
                    best = j;
                }
            }
            result[rank * inner] = (int32_t)best;
            last = best;
        }
    }
}
