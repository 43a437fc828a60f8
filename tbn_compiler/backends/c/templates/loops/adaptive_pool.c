/* The {{ title }} of the part of each image that an output pixel stands for. */
static void {{ name }}_adaptive_{{ function }}_pool(const float *x, float *y, size_t planes, size_t input_height,
    size_t input_width, size_t output_height, size_t output_width)
{
    for (size_t plane = 0; plane < planes; ++plane) {
        for (size_t row = 0; row < output_height; ++row) {
            const size_t top = row * input_height / output_height;
            const size_t bottom = ((row + 1) * input_height + output_height - 1) / output_height;

            for (size_t column = 0; column < output_width; ++column) {
                const size_t left = column * input_width / output_width;
                const size_t right = ((column + 1) * input_width + output_width - 1) / output_width;
                float value = {{ start }};

                for (size_t i = top; i < bottom; ++i) {
                    for (size_t j = left; j < right; ++j) {
                        const float pixel = x[i * input_width + j];
                        {{ step }}
                    }
                }
                *y++ = {{ result }};
            }
        }
        x += input_height * input_width;
    }
}
