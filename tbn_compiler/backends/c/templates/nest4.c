/* Loops over arrays of equal sizes, the last dimension innermost, with the strides of each array in elements. */
typedef struct {
    size_t size[6];
    ptrdiff_t shown[6];
    ptrdiff_t a[6];
    ptrdiff_t b[6];
    ptrdiff_t y[6];
} {{ name }}_nest4;
