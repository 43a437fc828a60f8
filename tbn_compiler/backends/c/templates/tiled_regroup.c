/*
 * Inputs by column group: 0, groups, 2 * groups, ..., then 1, groups + 1, and so on; groups divides their number.
 */
static void {{ name }}_tiled_regroup(const float *x, size_t inputs, size_t groups, float *y)
{
    for (size_t group = 0; group < groups; ++group) {
        for (size_t i = group; i < inputs; i += groups) {
            *y++ = x[i];
        }
    }
}
