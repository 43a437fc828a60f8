{# needs: window #}
/* Every output channel starts as its bias, or 0. */
static void {{ name }}_conv_transpose_start(const {{ name }}_window *window, const float *bias, size_t channels, float *y)
{
    const size_t size = window->input_height * window->input_width;

    for (size_t i = 0; i < channels * size; ++i) {
        y[i] = bias != NULL ? bias[i / size] : 0.0f;
    }
}
