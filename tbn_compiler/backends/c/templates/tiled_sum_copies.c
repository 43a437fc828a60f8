/*
 * Channels of each group, scaled, with equal signs summed: y[u, s] is the sum of alpha * x[c, s] over the channels c of the
 * group with c % different = u. A scale holds for channels_per_alpha channels, through all groups; NULL: not scaled.
 */
static void {{ name }}_tiled_sum_copies(const float *alpha, size_t channels_per_alpha, size_t channels, size_t different,
    size_t inner, const float *x, float *y, size_t groups)
{
    float scale = alpha != NULL ? *alpha : 1.0f;
    size_t left = channels_per_alpha;

    for (; groups != 0; --groups, y += different * inner) {
        for (size_t channel = 0; channel < channels; ++channel, --left) {
            float *sum = y + channel % different * inner;

            if (left == 0) {
                left = channels_per_alpha;
                scale = *++alpha;
            }
            if (channel < different) {
                for (size_t s = inner; s != 0; --s) {
                    *sum++ = scale * *x++;
                }
            } else {
                for (size_t s = inner; s != 0; --s) {
                    *sum++ += scale * *x++;
                }
            }
        }
    }
}
