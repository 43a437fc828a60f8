{# headers: math.h #}
/* Softmax of each row; the largest element is subtracted first, so that nothing overflows. y may be x. */
static void {{ name }}_softmax(const float *x, float *y, size_t rows, size_t columns)
{
    for (size_t row = 0; row < rows; ++row) {
        float largest = x[0];
        float sum = 0.0f;
        for (size_t j = 1; j < columns; ++j) {
            largest = x[j] > largest ? x[j] : largest;
        }
        for (size_t j = 0; j < columns; ++j) {
            y[j] = expf(x[j] - largest);
            sum += y[j];
        }
        for (size_t j = 0; j < columns; ++j) {
            y[j] /= sum;
        }
        x += columns;
        y += columns;
    }
}
