{# headers: math.h #}
/* What a / b, rounded down, leaves: it has the sign of b. */
static float {{ name }}_remainder_of(float a, float b)
{
    const float rest = fmodf(a, b);

    return (rest != 0.0f && (rest < 0.0f) != (b < 0.0f)) ? rest + b : rest;
}
