{# headers: stdint.h #}
/*
 * An integer result, from a sum that was multiplied by a power of two: (sum * multiplier / 2^32 + offset) / 2^shift,
 * both quotients rounded down, within limits. offset holds what is added behind the scale, and 2^(shift - 1), so that
 * the result is rounded to nearest. Right shifts of negative numbers keep the sign, as every compiler at hand does.
 */
static int8_t {{ name }}_requantize(int32_t sum, int32_t multiplier, int32_t offset, int shift, int32_t low, int32_t high)
{
    int32_t value = ((int32_t)(((int64_t)sum * multiplier) >> 32) + offset) >> shift;

    value = value > low ? value : low;
    value = value < high ? value : high;
    return (int8_t)value;
}
