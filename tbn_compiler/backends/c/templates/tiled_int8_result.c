{# headers: stdint.h #}
/* What follows the integer sums of a layer's different rows if its results are floats; as for int8. */
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
    /* Repeat c of row r has scale[r * scale_per_row + c * scale_per_repeat]: alpha times the scale of the inputs. */
    size_t scale_per_row;
    size_t scale_per_repeat;
    const float *scale;
    const float *bias; /* of each output, or NULL */
    int relu;
} {{ name }}_tiled_int8_result;
