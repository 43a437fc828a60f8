{# needs: tiled_fixed #}
/* The block of inputs whose parts are summed apart: shift, exponent, and the bits of the scale. */
static void {{ name }}_tiled_common_block(const float *x, size_t inputs, int precision, int32_t *block)
{
    const {{ name }}_fixed_block all = {{ name }}_fixed_block_of(x, inputs, precision);

    block[0] = all.shift;
    block[1] = all.exponent;
    block[2] = (int32_t){{ name }}_float_bits(all.scale);
}
