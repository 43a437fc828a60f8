static void {{ name }}_fill(float value, float *y, size_t size)
{
    for (size_t i = 0; i < size; ++i) {
        y[i] = value;
    }
}
