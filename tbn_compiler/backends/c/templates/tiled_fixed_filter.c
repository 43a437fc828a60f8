{# needs: window, tiled_filter_layer, tiled_fixed #}
/* Filters of any size over padded images of integers, four output positions of a line at a time. */
static void {{ name }}_tiled_fixed_filter(const {{ name }}_tiled_filter_layer *layer, const {{ name }}_window *window,
    const uint8_t *signs, const int32_t *planes, const int32_t *block, size_t index, int32_t *weights, float *y)
{
    const size_t step = window->stride_width;
    {{ name }}_fixed_block all;

    all.shift = 0;
    all.exponent = block[0];
    all.scale = {{ name }}_float_of_bits((uint32_t)block[1]);
    for (size_t r = index % layer->groups * layer->outputs, last = r + layer->outputs; r < last; ++r) {
        for (size_t i = 0, sign = r % layer->unique_rows * layer->elements; i < layer->elements; ++i, ++sign) {
            weights[i] = {{ name }}_tiled_filter_sign(signs, sign);
        }
        for (size_t row = 0; row < window->output_height; ++row) {
            const int32_t *line = planes + row * window->stride_height * layer->plane_width;

            for (size_t left = window->output_width, count; left != 0; left -= count, line += count * step) {
                const size_t next = left < 4 ? 0 : step; /* short of four positions the first one is computed alone */
                const int32_t *weight = weights;
                int32_t sums[4];
                int32_t y0 = 0;
                int32_t y1 = 0;
                int32_t y2 = 0;
                int32_t y3 = 0;

                for (size_t channel = 0; channel < layer->channels; ++channel) {
                    const int32_t *start = line + channel * layer->plane_height * layer->plane_width;

                    for (size_t i = window->kernel_height; i != 0; --i) {
                        const int32_t *x = start;

                        for (size_t j = window->kernel_width; j != 0; --j, x += window->dilation_width) {
                            if (*weight++ != 0) {
                                y0 += x[0];
                                y1 += x[next];
                                y2 += x[2 * next];
                                y3 += x[3 * next];
                            } else {
                                y0 -= x[0];
                                y1 -= x[next];
                                y2 -= x[2 * next];
                                y3 -= x[3 * next];
                            }
                        }
                        start += window->dilation_height * layer->plane_width;
                    }
                }
                sums[0] = y0;
                sums[1] = y1;
                sums[2] = y2;
                sums[3] = y3;
                count = left < 4 ? 1 : 4;
                for (size_t i = 0; i < count; ++i) {
                    float value = {{ name }}_fixed_result(sums[i], all);

                    if (layer->alpha != NULL) {
                        value *= layer->alpha[r / layer->outputs_per_alpha];
                    }
                    if (layer->bias != NULL) {
                        value += layer->bias[r];
                    }
                    *y++ = value < layer->lowest ? layer->lowest : value;
                }
            }
        }
    }
}
