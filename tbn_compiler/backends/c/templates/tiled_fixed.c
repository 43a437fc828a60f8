{# headers: stdint.h, string.h #}
/*
 * Block fixed point, for processors without floating-point instructions: all inputs of a layer as integers with one
 * common exponent, so that sums of them are exact.
 *
 * With m the largest magnitude and 2^e the smallest power of two above it, an input x becomes
 * round(x * 2^(precision - e)), halves away from zero: an error of at most 2^(e - precision - 1), which is at most
 * m * 2^-precision. precision is chosen such that no sum of all inputs, with any signs, overflows.
 */
typedef struct {
    int shift;    /* a float with the exponent field E is its mantissa shifted right by shift - E */
    int exponent; /* the integer 1 is 2^exponent; too large for a float if an input is infinite or NaN */
    float scale;  /* 2^exponent; NaN if an input is infinite or NaN, which makes every result NaN */
} {{ name }}_fixed_block;

static uint32_t {{ name }}_float_bits(float x)
{
    uint32_t bits;

    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static float {{ name }}_float_of_bits(uint32_t bits)
{
    float x;

    memcpy(&x, &bits, sizeof x);
    return x;
}

static {{ name }}_fixed_block {{ name }}_fixed_block_of(const float *x, size_t inputs, int precision)
{
    {{ name }}_fixed_block block;
    uint32_t largest = 0;
    int exponent;

    for (size_t i = 0; i < inputs; ++i) {
        const uint32_t magnitude = {{ name }}_float_bits(x[i]) << 1;
        largest = magnitude > largest ? magnitude : largest;
    }
    exponent = (int)(largest >> 24);
    block.shift = exponent + 24 - precision;
    if (exponent == 0) {
        /* Denormal numbers have no leading bit to count from. They need no shift if they are small enough. */
        for (block.shift = 1; largest >> block.shift >> precision != 0; ++block.shift) {
        }
    }
    block.exponent = block.shift - 150;
    if (exponent == 255) {
        block.exponent = 255;
        block.scale = {{ name }}_float_of_bits(0x7fc00000u);
    } else if (block.exponent >= -126) {
        block.scale = {{ name }}_float_of_bits((uint32_t)(block.exponent + 127) << 23);
    } else {
        block.scale = {{ name }}_float_of_bits((uint32_t)1 << (block.exponent + 149)); /* denormal */
    }
    return block;
}

/* sum * 2^exponent. Without floating-point instructions, adding to the exponent field is faster than multiplying. */
static float {{ name }}_fixed_result(int32_t sum, {{ name }}_fixed_block block)
{
    const float value = (float)sum;
    const uint32_t bits = {{ name }}_float_bits(value);
    const int exponent = (int)(bits >> 23 & 0xffu) + block.exponent;

    if (sum == 0 || exponent < 1 || exponent > 254) {
        return value * block.scale;
    }
    return {{ name }}_float_of_bits(bits + ((uint32_t)block.exponent << 23));
}

/* shift is that of the block; a mantissa that is shifted out leaves 0. */
static int32_t {{ name }}_fixed(float x, int shift)
{
    const uint32_t bits = {{ name }}_float_bits(x);
    const uint32_t exponent = bits >> 23 & 0xffu;
    const uint32_t normal = exponent != 0; /* else no hidden bit, and the exponent of the smallest normal number */
    const uint32_t mantissa = (bits & 0x7fffffu) | normal << 23;
    const int right = shift - 1 - (int)exponent + (int)normal;
    const int count = right < 31 ? right : 31;
    const uint32_t rounded = (mantissa + ((uint32_t)1 << count >> 1)) >> count;

    return (bits >> 31) != 0 ? -(int32_t)rounded : (int32_t)rounded;
}
