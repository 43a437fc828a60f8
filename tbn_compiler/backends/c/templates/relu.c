/* y may be x. */
static void {{ name }}_relu(const float *x, float *y, size_t size)
{
    for (size_t i = 0; i < size; ++i) {
        y[i] = x[i] < 0.0f ? 0.0f : x[i];
    }
}
