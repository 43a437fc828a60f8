/* Scaled dot-product attention: what a call is, and what a vector level computes of it. */
#ifndef TBN_ATTENTION_H
#define TBN_ATTENTION_H

#include <stddef.h>

/* What is added to scores: where it begins, and how far it is to the next sample, head, query and key (0 or 1). */
struct tbn_mask {
    const float *begin; /* NULL: nothing */
    size_t sample, head, query, key;
};

/*
 * out[i] = sum over j of (softmax over j of scale * query[i] . key[j] + mask[i][j]) * value[j], for each head of each
 * sample. With a mask a query whose scores are all -infinity gives zeros, as in PyTorch.
 */
struct tbn_attention {
    size_t samples, heads;
    size_t queries, keys;
    size_t width, value_width; /* of queries and keys; of values and results */
    float scale;
    int causal; /* query i meets keys 0 to i only */
    struct tbn_mask mask;
    size_t out_sample, out_head, out_next; /* how far it is in the result to the next sample, head and query */
};

/* Vectors of neighbouring floats: where they begin, and how far it is to the next sample, head and vector. */
struct tbn_vectors {
    const float *begin;
    size_t sample, head, next;
};

/* What a level provides. Levels without it leave attention to PyTorch. */
struct tbn_attention_kernels {
    size_t queries; /* that are computed at once */
    /* Bytes of room that a head takes. */
    size_t (*room)(const struct tbn_attention *job);
    /* Queries [first, last) of one head, whose vectors begin at `query`, `key`, `value` and `out`, and whose mask begins
       at `mask` (or NULL); `first` is a multiple of `queries`. */
    void (*head)(const struct tbn_attention *job, struct tbn_vectors query, struct tbn_vectors key,
                 struct tbn_vectors value, const float *mask, size_t first, size_t last, float *out, size_t out_next,
                 void *room);
};

#endif
