/* Each element of y is the sum of count neighbours in x. */
static void {{ name }}_sum_neighbours(const float *x, size_t count, float *y, size_t size)
{
    for (size_t i = 0; i < size; ++i) {
        float sum = 0.0f;
        for (size_t j = 0; j < count; ++j) {
            sum += *x++;
        }
        y[i] = sum;
    }
}
