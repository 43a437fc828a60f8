/* y[i, s] is the sum of x[i * count, s] to x[i * count + count - 1, s], for inner elements s. */
static void {{ name }}_sum_neighbours(const float *x, size_t count, size_t inner, float *y, size_t outer)
{
    for (size_t i = 0; i < outer; ++i) {
        for (size_t s = 0; s < inner; ++s) {
            float sum = 0.0f;
            for (size_t j = 0; j < count; ++j) {
                sum += x[j * inner + s];
            }
            *y++ = sum;
        }
        x += count * inner;
    }
}
