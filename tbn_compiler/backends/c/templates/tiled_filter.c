{# needs: window, tiled_filter_layer #}
/* Filters of any size over padded images, four output positions of a line at a time. weights holds those of a filter. */
static void {{ name }}_tiled_filter(const {{ name }}_tiled_filter_layer *layer, const {{ name }}_window *window,
    const uint8_t *signs, const float *planes, size_t index, float *weights, float *y)
{
    const size_t step = window->stride_width;

{% include "tiled/filter_start.c" %}
            for (size_t left = window->output_width, count; left != 0; left -= count, line += count * step) {
                const size_t next = left < 4 ? 0 : step; /* short of four positions the first one is computed alone */
                const float *weight = weights;
                float y0 = bias;
                float y1 = bias;
                float y2 = bias;
                float y3 = bias;

                for (size_t channel = 0; channel < layer->channels; ++channel) {
                    const float *start = line + channel * layer->plane_height * layer->plane_width;

                    for (size_t i = window->kernel_height; i != 0; --i) {
                        const float *x = start;

                        for (size_t j = window->kernel_width; j != 0; --j, x += window->dilation_width) {
                            y0 += *weight * x[0];
                            y1 += *weight * x[next];
                            y2 += *weight * x[2 * next];
                            y3 += *weight++ * x[3 * next];
                        }
                        start += window->dilation_height * layer->plane_width;
                    }
                }
                count = left < 4 ? 1 : 4;
                *y++ = y0 < lowest ? lowest : y0;
                if (count == 4) {
                    *y++ = y1 < lowest ? lowest : y1;
                    *y++ = y2 < lowest ? lowest : y2;
                    *y++ = y3 < lowest ? lowest : y3;
                }
            }
        }
    }
}
