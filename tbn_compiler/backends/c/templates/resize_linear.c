/*
 * Each image at another size: every output pixel lies between two rows and two columns of the input. A place i is at
 * scale * (i + shift) - shift of the input, but not before its first pixel.
 */
static void {{ name }}_resize_linear(const float *x, float *y, size_t planes, size_t input_height, size_t input_width,
    size_t output_height, size_t output_width, float scale_height, float scale_width, float shift)
{
    for (size_t row = 0; row < output_height; ++row) {
        const float down = scale_height * ((float)row + shift) - shift;
        const float from_top = down < 0.0f ? 0.0f : down;
        const size_t top = (size_t)from_top < input_height - 1 ? (size_t)from_top : input_height - 1;
        const size_t next_line = top < input_height - 1 ? input_width : 0;
        const float lower = from_top - (float)top < 1.0f ? from_top - (float)top : 1.0f;

        for (size_t column = 0; column < output_width; ++column) {
            const float across = scale_width * ((float)column + shift) - shift;
            const float from_left = across < 0.0f ? 0.0f : across;
            const size_t left = (size_t)from_left < input_width - 1 ? (size_t)from_left : input_width - 1;
            const size_t next = left < input_width - 1 ? 1 : 0;
            const float right = from_left - (float)left < 1.0f ? from_left - (float)left : 1.0f;
            const float *pixel = x + top * input_width + left;
            float *to = y + row * output_width + column;

            for (size_t plane = 0; plane < planes; ++plane) {
                const float *const below = pixel + next_line;
                const float above = (1.0f - right) * pixel[0] + right * pixel[next];

                *to = (1.0f - lower) * above + lower * ((1.0f - right) * below[0] + right * below[next]);
                pixel += input_height * input_width;
                to += output_height * output_width;
            }
        }
    }
}
