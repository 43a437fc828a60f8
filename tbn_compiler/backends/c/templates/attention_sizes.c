/* Attention; strides in elements, of batch, head, token and feature (mask: batch, head, query and key). */
typedef struct {
    size_t size[4]; /* batch, heads, queries, keys */
    size_t width;   /* features of queries and keys */
    size_t value_width;
    ptrdiff_t q[4];
    ptrdiff_t k[4];
    ptrdiff_t v[4];
    ptrdiff_t mask[4];
    ptrdiff_t y[4];
    float scale;
    int causal; /* a query sees no later key */
} {{ name }}_attention_sizes;
