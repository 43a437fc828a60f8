{# needs: window #}
/*
 * How much of one side of a window lies inside the image: elements from *first on. start is where the window begins; before
 * the image it is a number that wrapped around.
 */
static size_t {{ name }}_window_inside(size_t start, size_t kernel, size_t dilation, size_t size, size_t *first)
{
    size_t end;

    *first = 0;
    if (start < size && size - start > (kernel - 1) * dilation) {
        return kernel;
    }
    while (*first < kernel && start >= size) {
        start += dilation;
        ++*first;
    }
    for (end = *first; end < kernel && start < size; start += dilation) {
        ++end;
    }
    return end - *first;
}
