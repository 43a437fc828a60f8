/* How the tile of a linear layer fills its weight, where that is not simply end to end. */
typedef struct {
    size_t p_in;              /* neighbouring inputs that share a tile element */
    size_t shift;             /* copy i of the tile is rolled by i * shift elements */
    size_t input_size;        /* elements of x */
    const float *copy_alpha;  /* copy i has copy_alpha[i * p_in + j] at neighbour j; NULL: alphas scale whole rows */
    const float *input_alpha; /* the inputs are x times each of these, one behind the other; NULL: x as it is */
} {{ name }}_tiled_runs;
