/* y may be a or b.{{ note | default("") }} */
static void {{ name }}_{{ function }}(const float *a, const float *b, float *y, size_t size)
{
    for (size_t i = 0; i < size; ++i) {
        y[i] = {{ expression }};
    }
}
