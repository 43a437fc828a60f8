/* Working memory of one thread in one call: parts of one block, each aligned for vectors. */
#ifndef TBN_SCRATCH_H
#define TBN_SCRATCH_H

#include "kernels.h"

#include <stdlib.h>

static inline size_t tbn_round_up(size_t size, size_t multiple) {
    return (size + multiple - 1) / multiple * multiple;
}

static inline size_t tbn_ceil_divide(size_t a, size_t b) {
    return (a + b - 1) / b;
}

static inline size_t tbn_min(size_t a, size_t b) {
    return a < b ? a : b;
}

static inline size_t tbn_max(size_t a, size_t b) {
    return a > b ? a : b;
}

/* Memory aligned for vectors, or NULL; to be given to tbn_free. */
static inline void *tbn_allocate(size_t bytes) {
#if defined(_WIN32)
    return _aligned_malloc(bytes, TBN_ALIGN);
#else
    return aligned_alloc(TBN_ALIGN, tbn_round_up(bytes, TBN_ALIGN));
#endif
}

static inline void tbn_free(void *memory) {
#if defined(_WIN32)
    _aligned_free(memory);
#else
    free(memory);
#endif
}

/* Where to cut the next part. With `base` NULL only the size is counted. */
struct tbn_scratch {
    char *base;
    size_t used;
};

static inline void *tbn_take(struct tbn_scratch *scratch, size_t bytes) {
    char *part = scratch->base ? scratch->base + scratch->used : NULL;
    scratch->used += tbn_round_up(bytes, TBN_ALIGN);
    return part;
}

#endif
