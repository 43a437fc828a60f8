/* Each channel of inner elements times its scale plus its shift. y may be x. */
static void {{ name }}_channel_affine(const float *x, const float *scale, const float *shift, float *y, size_t samples,
    size_t channels, size_t inner)
{
    for (size_t i = 0; i < samples * channels; ++i) {
        for (size_t j = 0; j < inner; ++j) {
            *y++ = *x++ * scale[i % channels] + shift[i % channels];
        }
    }
}
