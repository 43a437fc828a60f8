{# headers: math.h #}
/*
 * Each row minus its mean, divided by its standard deviation, times weight plus bias (either may be NULL). y may be x.
 */
static void {{ name }}_norm(const float *x, const float *weight, const float *bias, float *y, size_t rows,
    size_t columns, float eps)
{
    for (size_t row = 0; row < rows; ++row) {
        float mean = 0.0f;
        float variance = 0.0f;
        float scale;

        for (size_t j = 0; j < columns; ++j) {
            mean += x[j];
        }
        mean /= (float)columns;
        for (size_t j = 0; j < columns; ++j) {
            variance += (x[j] - mean) * (x[j] - mean);
        }
        scale = 1.0f / sqrtf(variance / (float)columns + eps);
        for (size_t j = 0; j < columns; ++j) {
            const float value = (x[j] - mean) * scale;
            y[j] = (weight != NULL ? value * weight[j] : value) + (bias != NULL ? bias[j] : 0.0f);
        }
        x += columns;
        y += columns;
    }
}
