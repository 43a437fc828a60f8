{# headers: string.h #}
static void {{ name }}_copy(const float *x, float *y, size_t size)
{
    memcpy(y, x, size * sizeof(float));
}
