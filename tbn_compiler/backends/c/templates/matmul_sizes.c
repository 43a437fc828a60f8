/* A product of matrices; strides in elements, the last two of each array are those of rows and columns. */
typedef struct {
    size_t batch[3];
    size_t rows;
    size_t inner;
    size_t columns;
    ptrdiff_t a[5];
    ptrdiff_t b[5];
    ptrdiff_t y[5];
} {{ name }}_matmul_sizes;
