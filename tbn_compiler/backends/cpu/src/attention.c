/* Attention: heads are dealt out to threads, and parts of their queries where there are fewer heads than threads. */
#include "attention.h"
#include "pool.h"
#include "scratch.h"
#include "tbn_cpu.h"

#include <string.h>

enum { MIN_BLOCKS = 4 }; /* of queries, that a part has at least if there are so many */

/* One call: what its threads share. */
struct call {
    const struct tbn_attention_kernels *kernels;
    const struct tbn_attention *job;
    const struct tbn_vectors *query, *key, *value;
    float *out;
    size_t room;        /* bytes for one thread */
    size_t parts, part; /* parts of a head; queries of a part */
    tbn_counter next;   /* the next part to compute */
};

static struct tbn_vectors of(const struct tbn_vectors *all, size_t sample, size_t head) {
    struct tbn_vectors vectors = *all;
    vectors.begin += sample * all->sample + head * all->head;
    return vectors;
}

static void run(void *argument) {
    struct call *call = argument;
    const struct tbn_attention *job = call->job;
    void *room = tbn_allocate(call->room);
    if (!room)
        return; /* the parts are left to the other threads, or remain */
    for (;;) {
        const size_t unit = tbn_take_number(&call->next), one = unit / call->parts;
        if (one >= job->samples * job->heads)
            break;
        const size_t first = unit % call->parts * call->part, last = tbn_min(first + call->part, job->queries);
        const size_t sample = one / job->heads, head = one % job->heads;
        const struct tbn_mask *mask = &job->mask;
        call->kernels->head(job, of(call->query, sample, head), of(call->key, sample, head),
                            of(call->value, sample, head),
                            mask->begin ? mask->begin + sample * mask->sample + head * mask->head : NULL, first, last,
                            call->out + sample * job->out_sample + head * job->out_head, job->out_next, room);
    }
    tbn_free(room);
}

int tbn_attention(const struct tbn_kernels *kernels, const struct tbn_attention *job, const struct tbn_vectors *query,
                  const struct tbn_vectors *key, const struct tbn_vectors *value, float *out, size_t threads) {
    struct call call = {kernels->attention, job, query, key, value, out, 0, 0, 0, {0}};
    size_t units = job->samples * job->heads;
    if (units == 0 || job->queries == 0 || job->value_width == 0)
        return TBN_OK;
    if (job->keys == 0) {
        memset(out, 0, units * job->queries * job->value_width * sizeof *out);
        return TBN_OK;
    }
    call.room = tbn_max(call.kernels->room(job), TBN_ALIGN);
    /* Each part brings the keys into order for itself: it has some blocks of queries. */
    const size_t blocks = tbn_ceil_divide(job->queries, call.kernels->queries);
    const size_t wanted = tbn_min(tbn_ceil_divide(threads, units), tbn_ceil_divide(blocks, MIN_BLOCKS));
    call.part = tbn_ceil_divide(blocks, wanted) * call.kernels->queries;
    call.parts = tbn_ceil_divide(job->queries, call.part);
    units *= call.parts;
    tbn_parallel(tbn_min(threads, units), run, &call);
    return tbn_taken(&call.next) < units ? TBN_OUT_OF_MEMORY : TBN_OK;
}

int tbn_has_attention(const struct tbn_kernels *kernels) {
    return kernels->attention != NULL;
}
