{# headers: stdint.h #}
/*
 * What follows the integer sums of a layer's different rows if its results are int8. An output feature or channel
 * repeats row (its number % rows). Positions are those of an image, or vectors; pairs of them lie in one line.
 */
typedef struct {
{% include "tiled/int8_places.c" %}
    /* Repeat c of row r has multiplier[r * scale_per_row + c * scale_per_repeat]. */
    size_t scale_per_row;
    size_t scale_per_repeat;
    const int32_t *multiplier;
    const int32_t *offset; /* of each output; NULL: half */
    int32_t half;
    int32_t factor; /* of the sums */
    int shift;
    int32_t low; /* limits of the results */
    int32_t high;
} {{ name }}_tiled_int8_layer;
