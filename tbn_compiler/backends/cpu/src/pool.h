/* Threads that wait for work between calls. */
#ifndef TBN_POOL_H
#define TBN_POOL_H

#include <stddef.h>

/*
 * Runs body(job) on the calling thread and on up to threads - 1 others, and returns when all have finished. The body
 * takes its share of the work from the job until nothing is left, so that it is right on any number of threads: while
 * another call has the pool, or where no thread can be started, the caller does everything.
 */
void tbn_parallel(size_t threads, void (*body)(void *), void *job);

#endif
