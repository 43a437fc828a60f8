#include "pool.h"

#include "tbn_cpu.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

enum { MAX_WORKERS = 255 };

/* How often an idle worker looks for work before it sleeps: some 20 us, about what waking it would take. */
enum { SPINS = 500 };

enum state { IDLE, OFFERED, RUNNING };

/* A worker and the one job that it is offered. */
struct worker {
    _Atomic int state;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    void (*body)(void *);
    void *job;
};

static struct worker workers[MAX_WORKERS];
static size_t started;
static pthread_mutex_t pool_lock = PTHREAD_MUTEX_INITIALIZER; /* held by the call that uses the workers */
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int change(struct worker *worker, int from, int to) {
    return atomic_compare_exchange_strong(&worker->state, &from, to);
}

static void *work(void *argument) {
    struct worker *self = argument;
    for (;;) {
        for (int spin = 0; spin < SPINS && atomic_load(&self->state) != OFFERED; spin++)
            relax();
        if (atomic_load(&self->state) != OFFERED) {
            pthread_mutex_lock(&self->lock);
            while (atomic_load(&self->state) != OFFERED)
                pthread_cond_wait(&self->wake, &self->lock);
            pthread_mutex_unlock(&self->lock);
        }
        if (change(self, OFFERED, RUNNING)) { /* else the caller did the work and took the offer back */
            self->body(self->job);
            atomic_store(&self->state, IDLE);
        }
    }
    return NULL;
}

/* A forked process has no workers: it starts its own. The lock is held meanwhile, so that no job is cut in two. */
static void before_fork(void) {
    pthread_mutex_lock(&pool_lock);
}

static void after_fork_in_parent(void) {
    pthread_mutex_unlock(&pool_lock);
}

static void after_fork_in_child(void) {
    started = 0;
    pthread_mutex_init(&pool_lock, NULL);
}

static void install_fork_handlers(void) {
    pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
}

static int start_worker(struct worker *worker) {
    pthread_t thread;
    atomic_init(&worker->state, IDLE);
    pthread_mutex_init(&worker->lock, NULL);
    pthread_cond_init(&worker->wake, NULL);
    if (pthread_create(&thread, NULL, work, worker) != 0)
        return 0;
    pthread_detach(thread);
    return 1;
}

/* Waits until a worker is done. Where it lost its core to another thread, spinning would only keep it from coming back. */
static void wait_for(struct worker *worker) {
    for (int spin = 0; atomic_load(&worker->state) != IDLE; spin += spin < SPINS)
        if (spin < SPINS)
            relax();
        else
            sched_yield();
}

void tbn_parallel(size_t threads, void (*body)(void *), void *job) {
    pthread_once(&once, install_fork_handlers);
    size_t helpers = threads < 1 ? 0 : threads - 1;
    if (helpers > MAX_WORKERS)
        helpers = MAX_WORKERS;
    if (helpers == 0 || pthread_mutex_trylock(&pool_lock) != 0) {
        body(job);
        return;
    }
    while (started < helpers && start_worker(&workers[started]))
        started++;
    if (helpers > started)
        helpers = started;
    for (size_t i = 0; i < helpers; i++) {
        struct worker *worker = &workers[i];
        pthread_mutex_lock(&worker->lock);
        worker->body = body;
        worker->job = job;
        atomic_store(&worker->state, OFFERED);
        pthread_cond_signal(&worker->wake);
        pthread_mutex_unlock(&worker->lock);
    }
    body(job);
    for (size_t i = 0; i < helpers; i++)
        if (!change(&workers[i], OFFERED, IDLE))
            wait_for(&workers[i]);
    pthread_mutex_unlock(&pool_lock);
}

size_t tbn_pool_threads(void) {
    pthread_mutex_lock(&pool_lock);
    const size_t threads = started;
    pthread_mutex_unlock(&pool_lock);
    return threads;
}
