{# headers: stdint.h #}
/* Two neighbouring vectors of count, as x0 + 65536 * x1; behind the last vector come zeros. */
static void {{ name }}_int8_pair_vectors(const int8_t *x, size_t inputs, size_t count, size_t pair, int32_t *both)
{
    const int8_t *const first = x + 2 * pair * inputs;
    const int8_t *const second = first + inputs;
    const int last = 2 * pair + 1 == count;

    for (size_t i = 0; i < inputs; ++i) {
        both[i] = first[i] + (last ? 0 : second[i] * 65536);
    }
}
