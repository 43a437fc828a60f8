#include "pool.h"

#include "system.h"
#include "tbn_cpu.h"

enum { MAX_WORKERS = 255 };

/* How often an idle worker looks for work before it sleeps: some 20 us, about what waking it would take. */
enum { SPINS = 500 };

enum state { IDLE, OFFERED, RUNNING };

/* A worker and the one job that it is offered. */
struct worker {
    tbn_state state;
    tbn_lock lock;
    tbn_condition wake;
    void (*body)(void *);
    void *job;
};

static struct worker workers[MAX_WORKERS];
static size_t started;
static tbn_lock pool_lock = TBN_LOCK_INITIALIZER; /* held by the call that uses the workers */

static TBN_THREAD work(void *argument) {
    struct worker *self = argument;
    for (;;) {
        for (int spin = 0; spin < SPINS && tbn_get_state(&self->state) != OFFERED; spin++)
            tbn_relax();
        if (tbn_get_state(&self->state) != OFFERED) {
            tbn_acquire(&self->lock);
            while (tbn_get_state(&self->state) != OFFERED)
                tbn_wait(&self->wake, &self->lock);
            tbn_release(&self->lock);
        }
        if (tbn_change_state(&self->state, OFFERED, RUNNING)) { /* else the caller did the work and took the offer back */
            self->body(self->job);
            tbn_set_state(&self->state, IDLE);
        }
    }
    return 0;
}

#if defined(_WIN32)
static void expect_forks(void) { /* Windows has none */
}
#else
/* A forked process has no workers: it starts its own. The lock is held meanwhile, so that no job is cut in two. */
static void before_fork(void) {
    tbn_acquire(&pool_lock);
}

static void after_fork_in_parent(void) {
    tbn_release(&pool_lock);
}

static void after_fork_in_child(void) {
    started = 0;
    tbn_init_lock(&pool_lock);
}

static void install_fork_handlers(void) {
    pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
}

static void expect_forks(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, install_fork_handlers);
}
#endif

static int start_worker(struct worker *worker) {
    tbn_set_state(&worker->state, IDLE);
    tbn_init_lock(&worker->lock);
    tbn_init_condition(&worker->wake);
    return tbn_start_thread(work, worker);
}

/* Waits until a worker is done. Where it lost its core to another thread, spinning would only keep it from coming back. */
static void wait_for(struct worker *worker) {
    for (int spin = 0; tbn_get_state(&worker->state) != IDLE; spin += spin < SPINS)
        if (spin < SPINS)
            tbn_relax();
        else
            tbn_yield();
}

void tbn_parallel(size_t threads, void (*body)(void *), void *job) {
    expect_forks();
    size_t helpers = threads < 1 ? 0 : threads - 1;
    if (helpers > MAX_WORKERS)
        helpers = MAX_WORKERS;
    if (helpers == 0 || !tbn_try_acquire(&pool_lock)) {
        body(job);
        return;
    }
    while (started < helpers && start_worker(&workers[started]))
        started++;
    if (helpers > started)
        helpers = started;
    for (size_t i = 0; i < helpers; i++) {
        struct worker *worker = &workers[i];
        tbn_acquire(&worker->lock);
        worker->body = body;
        worker->job = job;
        tbn_set_state(&worker->state, OFFERED);
        tbn_wake(&worker->wake);
        tbn_release(&worker->lock);
    }
    body(job);
    for (size_t i = 0; i < helpers; i++)
        if (!tbn_change_state(&workers[i].state, OFFERED, IDLE))
            wait_for(&workers[i]);
    tbn_release(&pool_lock);
}

size_t tbn_pool_threads(void) {
    tbn_acquire(&pool_lock);
    const size_t threads = started;
    tbn_release(&pool_lock);
    return threads;
}
