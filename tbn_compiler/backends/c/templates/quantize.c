{# headers: stdint.h #}
/* round(x * factor), halves to even, within limits of at most 127; NaN becomes 0. */
static void {{ name }}_quantize(const float *x, float factor, int32_t low, int32_t high, int8_t *y, size_t size)
{
    for (size_t i = 0; i < size; ++i) {
        const float value = x[i] * factor;
        const float limited = value > 127.0f ? 127.0f : value < -127.0f ? -127.0f : value == value ? value : 0.0f;
        /* With this number added, halves are rounded to even behind the last digit. */
        const float shifted = limited + 12582912.0f;
        int32_t rounded = (int32_t)(shifted - 12582912.0f);

        rounded = rounded > low ? rounded : low;
        rounded = rounded < high ? rounded : high;
        y[i] = (int8_t)rounded;
    }
}
