{# headers: stdint.h #}
static void {{ name }}_dequantize(const int8_t *x, float scale, float *y, size_t size)
{
    for (size_t i = 0; i < size; ++i) {
        y[i] = (float)x[i] * scale;
    }
}
