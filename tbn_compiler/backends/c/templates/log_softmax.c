{# headers: math.h #}
/* The logarithm of the softmax of count elements, inner apart. y may be x. */
static void {{ name }}_log_softmax(const float *x, float *y, size_t outer, size_t count, size_t inner)
{
    for (size_t i = 0; i < outer * inner; ++i) {
        const size_t first = i / inner * count * inner + i % inner;
        float largest = x[first];
        float sum;

        for (size_t j = 1; j < count; ++j) {
            largest = x[first + j * inner] > largest ? x[first + j * inner] : largest;
        }
        sum = expf(x[first] - largest);
        for (size_t j = 1; j < count; ++j) {
            sum += expf(x[first + j * inner] - largest);
        }
        sum = logf(sum);
        for (size_t j = 0; j < count; ++j) {
            y[first + j * inner] = x[first + j * inner] - largest - sum;
        }
    }
}
