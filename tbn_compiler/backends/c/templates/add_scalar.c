/* y may be x. */
static void {{ name }}_add_scalar(const float *x, float scalar, float *y, size_t size)
{
    for (size_t i = 0; i < size; ++i) {
        y[i] = x[i] + scalar;
    }
}
