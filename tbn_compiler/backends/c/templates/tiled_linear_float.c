{# needs: tiled_linear_store, tiled_runs #}
/* The sum of count elements of x, stride apart, times the elements at positions t, t + 1, ... of the tile. */
static float {{ name }}_float_product(const float *tile, size_t t, const float *x, size_t stride, size_t count)
{
    float sum = 0.0f;

    for (size_t i = 0; i < count; ++i) {
        sum += tile[t + i] * x[i * stride];
    }
    return sum;
}

{% set kind, element = "float", "float" %}
{% include "tiled_linear_runs.c" %}
