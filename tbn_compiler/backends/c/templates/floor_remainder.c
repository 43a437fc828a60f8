{# headers: stdint.h #}
/* What a / b, rounded down, leaves: it has the sign of b. A divisor of 0, for which PyTorch stops, gives 0. */
static int32_t {{ name }}_floor_remainder(int32_t a, int32_t b)
{
    const int32_t rest = (b == 0 || b == -1) ? 0 : a % b;

    return (rest != 0 && (rest < 0) != (b < 0)) ? rest + b : rest;
}
