{# headers: math.h #}
/* a / b, rounded down; from the remainder, so that rounding the quotient does not reach the next integer. */
static float {{ name }}_floor_of_quotient(float a, float b)
{
    const float rest = fmodf(a, b);
    float quotient = (a - rest) / b;
    float down;

    if (b == 0.0f) {
        return a / b;
    }
    if (rest != 0.0f && (rest < 0.0f) != (b < 0.0f)) {
        quotient -= 1.0f;
    }
    if (quotient == 0.0f) {
        return copysignf(0.0f, a / b);
    }
    down = floorf(quotient);
    return quotient - down > 0.5f ? down + 1.0f : down;
}
