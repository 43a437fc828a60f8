{# headers: stdint.h #}
/*
 * What follows the integer sums of a layer's different rows if its results are int8. An output feature or channel
 * repeats row (its number % rows). Positions are those of an image, or vectors; pairs of them lie in one line.
 */
typedef struct {
    size_t rows;
    size_t parts;     /* of the inputs, with sums of their own */
    size_t part_sums; /* of each part */
    size_t repeats;   /* of each row among the outputs */
    size_t width; /* positions of a line */
    size_t lines; /* of a sample */
    size_t sample_stride;
    size_t line_stride;
    size_t position_stride;
    size_t output_stride;
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
