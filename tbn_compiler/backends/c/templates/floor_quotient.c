{# needs: quotient #}
/* a / b, rounded down. */
static int32_t {{ name }}_floor_quotient(int32_t a, int32_t b)
{
    const int32_t quotient = {{ name }}_quotient(a, b);

    return (b != 0 && b != -1 && quotient * b != a && (a < 0) != (b < 0)) ? quotient - 1 : quotient;
}
