{# headers: stdint.h, string.h #}
/* Copies the lines of an image to lines that are pitch bytes apart, with 128 added, so that all is from 0 to 255. */
static void {{ name }}_tiled_int8_inside(const int8_t *image, size_t width, size_t lines, size_t copied, size_t pitch, uint8_t *padded)
{
    for (; lines != 0; --lines, image += width, padded += pitch) {
        size_t i = 0;

        if (copied >= 4) {
            /* The last word may lie over the one before it. */
            for (size_t next = 0; i < copied; i += 4, next = i + 4 <= copied ? i : copied - 4) {
                uint32_t four;

                memcpy(&four, image + next, sizeof four);
                four ^= 0x80808080u;
                memcpy(padded + next, &four, sizeof four);
            }
        } else {
            for (; i < copied; ++i) {
                padded[i] = (uint8_t)(image[i] + 128);
            }
        }
    }
}
