{# needs: activate #}
/* weight [out_features x in_features], bias of out_features elements or NULL. */
static void {{ name }}_linear(const float *weight, const float *bias, size_t in_features, size_t out_features, int relu,
    const float *x, float *y)
{
    for (size_t row = 0; row < out_features; ++row) {
        float value = 0.0f;
        for (size_t j = 0; j < in_features; ++j) {
            value += *weight++ * x[j];
        }
        y[row] = {{ name }}_activate(bias != NULL ? value + bias[row] : value, relu);
    }
}
