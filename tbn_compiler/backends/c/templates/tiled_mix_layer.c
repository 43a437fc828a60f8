/*
 * A layer whose copies have the signs of a Hadamard matrix H, H[i][j] = -1 where i & j has an odd number of bits: its
 * output of copy i and tile row r is the sum over column groups j of H[i][j] times the group's product with the row.
 */
typedef struct {
    size_t rows;      /* of the tile */
    size_t stride;    /* from the products of a column group to those of the next one */
    size_t groups;    /* as many as copies, a power of two */
    size_t positions; /* of each channel; 1 for features */
    /* Copy i of row r is scaled by alpha[r * alpha_per_row + i * alpha_per_copy]. */
    size_t alpha_per_row;
    size_t alpha_per_copy;
    const float *alpha; /* NULL: not scaled */
    const float *bias;  /* of each output, or NULL */
    int relu;
} {{ name }}_tiled_mix_layer;
