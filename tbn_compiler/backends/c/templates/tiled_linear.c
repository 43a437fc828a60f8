{# headers: stdint.h #}
/*
 * A linear layer whose weight, read row by row, is one tile repeated from end to end, each row times its alpha.
 * Bits: element j of the tile is bit j % 8 of byte j / 8, 1 for +1 and 0 for -1.
 */
typedef struct {
    size_t in_features;
    size_t out_features;
    size_t unique_rows;    /* rows to compute; row r has the signs of row r % unique_rows */
    size_t tile_size;      /* elements */
    size_t rows_per_alpha; /* row r has alpha[r / rows_per_alpha] */
    const float *alpha;    /* NULL: 1 for every row */
    const float *bias;     /* out_features elements, or NULL */
    int relu;
} {{ name }}_tiled_linear;
