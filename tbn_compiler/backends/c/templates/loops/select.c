{# Parameters: kernel; element, the C type. #}
/* Elements of a where the byte in shown is not 0, else of b; a step of 0 is one number for all. y may be a or b. */
static void {{ name }}_{{ kernel }}(const uint8_t *shown, const {{ element }} *a, const {{ element }} *b, size_t a_step, size_t b_step,
    {{ element }} *y, size_t size)
{
    for (size_t i = 0; i < size; ++i) {
        y[i] = shown[i] != 0 ? a[i * a_step] : b[i * b_step];
    }
}
