{# headers: stdint.h #}
/* a / b, rounded towards 0. A divisor of 0, for which PyTorch stops, gives 0. */
static int32_t {{ name }}_quotient(int32_t a, int32_t b)
{
    if (b == 0) {
        return 0;
    }
    return b == -1 ? (int32_t)(0u - (uint32_t)a) : a / b;
}
