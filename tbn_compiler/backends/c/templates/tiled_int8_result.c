{# headers: stdint.h #}
/* What follows the integer sums of a layer's different rows if its results are floats; as for int8. */
typedef struct {
{% include "tiled/int8_places.c" %}
    /* Repeat c of row r has scale[r * scale_per_row + c * scale_per_repeat]: alpha times the scale of the inputs. */
    size_t scale_per_row;
    size_t scale_per_repeat;
    const float *scale;
    const float *bias; /* of each output, or NULL */
    int relu;
} {{ name }}_tiled_int8_result;
