/* Each image at another size: every output pixel is the input pixel at the same place. */
static void {{ name }}_resize_nearest(const float *x, float *y, size_t planes, size_t input_height, size_t input_width,
    size_t output_height, size_t output_width)
{
    for (size_t plane = 0; plane < planes; ++plane) {
        for (size_t row = 0; row < output_height; ++row) {
            const float *const line = x + row * input_height / output_height * input_width;

            for (size_t column = 0; column < output_width; ++column) {
                *y++ = line[column * input_width / output_width];
            }
        }
        x += input_height * input_width;
    }
}
