/* Inputs that stand for scaled copies of them, channel by channel. */
typedef struct {
    size_t channels;
    size_t elements; /* of each channel, one behind the other */
    size_t groups;   /* of columns; divides channels */
    size_t copies;
    const float *scale; /* of each copy */
} {{ name }}_tiled_expand_layer;

/* Write all copies out, with their scales: by column group, there by copy, and the channels in the order of regroup. */
static void {{ name }}_tiled_expand(const {{ name }}_tiled_expand_layer *layer, const float *x, float *y)
{
    for (size_t group = 0; group < layer->groups; ++group) {
        for (size_t copy = 0; copy < layer->copies; ++copy) {
            for (size_t channel = group; channel < layer->channels; channel += layer->groups) {
                for (size_t i = 0; i < layer->elements; ++i) {
                    *y++ = layer->scale[copy] * x[channel * layer->elements + i];
                }
            }
        }
    }
}
