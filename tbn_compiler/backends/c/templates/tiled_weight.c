{# headers: stdint.h #}
/*
 * How a tile in any layout fills a weight of rows x row_size elements; a row holds kernel_size elements for each
 * input channel. Bits: element j of the tile is bit j % 8 of byte j / 8, 1 for +1 and 0 for -1.
 */
typedef struct {
    size_t row_size;
    size_t kernel_size;
    size_t tile_size;         /* elements */
    size_t tile_rows;         /* the tile has this many rows, which repeat; 0: copies follow one another end to end */
    size_t p_in;              /* neighbouring input channels that share a tile element */
    size_t shift;             /* copy i of the tile is rolled by i * shift elements */
    int hadamard;             /* copy i has the sign -1 at the input channels c where i & c has an odd number of bits */
    const float *copy_alpha;  /* copy i has copy_alpha[i * p_in + j] at neighbour j; NULL: alphas scale whole rows */
    const float *input_alpha; /* the channels are x times each of these, one behind the other; NULL: x as it is */
} {{ name }}_tiled_weight;

/* Where in the tile the element of a row stands; *scale receives the alpha of its copy, and the sign there. */
static size_t {{ name }}_tiled_position(const {{ name }}_tiled_weight *weight, size_t row, size_t column, float *scale)
{
    size_t copy;
    size_t position;

    if (weight->tile_rows != 0) {
        const size_t channel = column / weight->kernel_size;
        const size_t inputs = weight->row_size / weight->p_in; /* elements of one row of the tile */

        copy = row / weight->tile_rows * weight->p_in + channel % weight->p_in;
        position = row % weight->tile_rows * inputs + channel / weight->p_in * weight->kernel_size
            + column % weight->kernel_size;
    } else {
        const size_t index = row * weight->row_size + column;

        copy = index / weight->tile_size;
        position = (index % weight->tile_size + weight->tile_size - copy * weight->shift % weight->tile_size)
            % weight->tile_size;
    }
    *scale = weight->copy_alpha != NULL ? weight->copy_alpha[copy] : 1.0f;
    if (weight->hadamard) {
        for (size_t common = copy & (column / weight->kernel_size); common != 0; common &= common - 1) {
            *scale = -*scale;
        }
    }
    return position;
}
