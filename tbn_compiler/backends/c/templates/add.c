/* y may be a or b. */
static void {{ name }}_add(const float *a, const float *b, float *y, size_t size)
{
    for (size_t i = 0; i < size; ++i) {
        y[i] = a[i] + b[i];
    }
}
