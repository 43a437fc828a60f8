{# The head of every kernel that multiplies filters in floating point: a filter's weights, and a line of the output. #}
    for (size_t r = index % layer->groups * layer->outputs, last = r + layer->outputs; r < last; ++r) {
        const float alpha = layer->alpha != NULL ? layer->alpha[r / layer->outputs_per_alpha] : 1.0f;
        const float bias = layer->bias != NULL ? layer->bias[r] : 0.0f;
        const float lowest = layer->lowest;

        for (size_t i = 0, sign = r % layer->unique_rows * layer->elements; i < layer->elements; ++i, ++sign) {
            weights[i] = {{ name }}_tiled_filter_sign(signs, sign) ? alpha : -alpha;
        }
        for (size_t row = 0; row < window->output_height; ++row) {
            const float *line = planes + row * window->stride_height * layer->plane_width;

