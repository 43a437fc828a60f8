{# needs: requantize #}
/* The products of elements of a with those of b, each of which serves inner neighbouring ones of a, as int8 with a scale of their own. */
static void {{ name }}_int8_product(const int8_t *a, const int8_t *b, int32_t factor, int32_t multiplier, int shift, int32_t low, int32_t high,
    int8_t *y, size_t outer, size_t inner)
{
    const int32_t half = (int32_t)1 << shift >> 1;

    for (; outer != 0; --outer, ++b) {
        const int32_t scaled = *b * factor;

        for (size_t i = 0; i < inner; ++i) {
            *y++ = {{ name }}_requantize(*a++ * scaled, multiplier, half, shift, low, high);
        }
    }
}
