{# needs: tiled_linear_store, tiled_runs #}
/* The sum of count elements of x, stride apart, with the signs at positions t, t + 1, ... of the tile. */
static float {{ name }}_bits_product(const uint8_t *tile, size_t t, const float *x, size_t stride, size_t count)
{
    float sum = 0.0f;

    for (size_t i = 0; i < count; ++i, ++t) {
        const float value = x[i * stride];
        sum += ((unsigned)tile[t / 8] >> (t % 8) & 1u) ? value : -value;
    }
    return sum;
}

{% set kind, element = "bits", "uint8_t" %}
{% include "tiled_linear_runs.c" %}
