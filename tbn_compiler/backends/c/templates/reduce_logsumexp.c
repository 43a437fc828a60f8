{# headers: math.h #}
/*
 * The logarithm of the sum of exp of count elements, inner apart; the largest is subtracted first, so that nothing
 * overflows.
 */
static void {{ name }}_reduce_logsumexp(const float *x, float *y, size_t outer, size_t count, size_t inner)
{
    for (size_t i = 0; i < outer * inner; ++i) {
        const float *const first = x + i / inner * count * inner + i % inner;
        float largest = first[0];
        float sum;

        for (size_t j = 1; j < count; ++j) {
            largest = first[j * inner] > largest ? first[j * inner] : largest;
        }
        if (fabsf(largest) == INFINITY) {
            largest = 0.0f;
        }
        sum = expf(first[0] - largest);
        for (size_t j = 1; j < count; ++j) {
            sum += expf(first[j * inner] - largest);
        }
        y[i] = logf(sum) + largest;
    }
}
