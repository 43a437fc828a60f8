/* Attention: heads are dealt out to threads. */
#include "attention.h"
#include "pool.h"
#include "scratch.h"
#include "tbn_cpu.h"

#include <string.h>

/* One call: what its threads share. */
struct call {
    const struct tbn_attention_kernels *kernels;
    const struct tbn_attention *job;
    const struct tbn_vectors *query, *key, *value;
    float *out;       /* [samples][queries][heads][value_width] */
    size_t room;      /* bytes for one thread */
    tbn_counter next; /* the next head to compute */
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
        return; /* the heads are left to the other threads, or remain */
    for (;;) {
        const size_t unit = tbn_take_number(&call->next);
        if (unit >= job->samples * job->heads)
            break;
        const size_t sample = unit / job->heads, head = unit % job->heads, next = job->heads * job->value_width;
        const struct tbn_mask *mask = &job->mask;
        call->kernels->head(job, of(call->query, sample, head), of(call->key, sample, head),
                            of(call->value, sample, head),
                            mask->begin ? mask->begin + sample * mask->sample + head * mask->head : NULL,
                            call->out + sample * job->queries * next + head * job->value_width, next, room);
    }
    tbn_free(room);
}

int tbn_attention(const struct tbn_kernels *kernels, const struct tbn_attention *job, const struct tbn_vectors *query,
                  const struct tbn_vectors *key, const struct tbn_vectors *value, float *out, size_t threads) {
    struct call call = {kernels->attention, job, query, key, value, out, 0, {0}};
    const size_t units = job->samples * job->heads;
    if (units == 0 || job->queries == 0 || job->value_width == 0)
        return TBN_OK;
    if (job->keys == 0) {
        memset(out, 0, units * job->queries * job->value_width * sizeof *out);
        return TBN_OK;
    }
    call.room = tbn_max(call.kernels->room(job), TBN_ALIGN);
    tbn_parallel(tbn_min(threads, units), run, &call);
    return tbn_taken(&call.next) < units ? TBN_OUT_OF_MEMORY : TBN_OK;
}

int tbn_has_attention(const struct tbn_kernels *kernels) {
    return kernels->attention != NULL;
}
