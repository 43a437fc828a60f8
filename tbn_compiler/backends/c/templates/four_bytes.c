{# headers: stdint.h, string.h #}
/* Four neighbouring bytes as one number, the first one lowest. */
static uint32_t {{ name }}_four_bytes(const uint8_t *x)
{
#if defined(__BYTE_ORDER__) && defined(__ORDER_LITTLE_ENDIAN__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    uint32_t word;

    memcpy(&word, x, sizeof word);
    return word;
#else
    return (uint32_t)x[0] | (uint32_t)x[1] << 8 | (uint32_t)x[2] << 16 | (uint32_t)x[3] << 24;
#endif
}
