/* Locks and threads, of POSIX or of Windows. */
#ifndef TBN_SYSTEM_H
#define TBN_SYSTEM_H

#if defined(_WIN32)

#define WIN32_LEAN_AND_MEAN
#include <windows.h>

#include <process.h>

typedef SRWLOCK tbn_lock;
typedef CONDITION_VARIABLE tbn_condition;

#define TBN_LOCK_INITIALIZER SRWLOCK_INIT

/* What the function of a thread returns. */
#define TBN_THREAD unsigned __stdcall

static inline void tbn_acquire(tbn_lock *lock) {
    AcquireSRWLockExclusive(lock);
}

static inline int tbn_try_acquire(tbn_lock *lock) {
    return TryAcquireSRWLockExclusive(lock) != 0;
}

static inline void tbn_release(tbn_lock *lock) {
    ReleaseSRWLockExclusive(lock);
}

static inline void tbn_init_lock(tbn_lock *lock) {
    InitializeSRWLock(lock);
}

static inline void tbn_init_condition(tbn_condition *condition) {
    InitializeConditionVariable(condition);
}

static inline void tbn_wait(tbn_condition *condition, tbn_lock *lock) {
    SleepConditionVariableSRW(condition, lock, INFINITE, 0);
}

static inline void tbn_wake(tbn_condition *condition) {
    WakeConditionVariable(condition);
}

/* Starts a thread that nobody waits for; returns whether there is one. */
static inline int tbn_start_thread(unsigned(__stdcall *body)(void *), void *argument) {
    const uintptr_t thread = _beginthreadex(NULL, 0, body, argument, 0, NULL);
    if (thread)
        CloseHandle((HANDLE)thread);
    return thread != 0;
}

/* Lets another thread have the core. */
static inline void tbn_yield(void) {
    SwitchToThread();
}

/* Between two looks at a value that another thread writes. */
static inline void tbn_relax(void) {
    YieldProcessor();
}

#else

#include <pthread.h>
#include <sched.h>

typedef pthread_mutex_t tbn_lock;
typedef pthread_cond_t tbn_condition;

#define TBN_LOCK_INITIALIZER PTHREAD_MUTEX_INITIALIZER

/* What the function of a thread returns. */
#define TBN_THREAD void *

static inline void tbn_acquire(tbn_lock *lock) {
    pthread_mutex_lock(lock);
}

static inline int tbn_try_acquire(tbn_lock *lock) {
    return pthread_mutex_trylock(lock) == 0;
}

static inline void tbn_release(tbn_lock *lock) {
    pthread_mutex_unlock(lock);
}

static inline void tbn_init_lock(tbn_lock *lock) {
    pthread_mutex_init(lock, NULL);
}

static inline void tbn_init_condition(tbn_condition *condition) {
    pthread_cond_init(condition, NULL);
}

static inline void tbn_wait(tbn_condition *condition, tbn_lock *lock) {
    pthread_cond_wait(condition, lock);
}

static inline void tbn_wake(tbn_condition *condition) {
    pthread_cond_signal(condition);
}

/* Starts a thread that nobody waits for; returns whether there is one. */
static inline int tbn_start_thread(void *(*body)(void *), void *argument) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, body, argument) != 0)
        return 0;
    pthread_detach(thread);
    return 1;
}

/* Lets another thread have the core. */
static inline void tbn_yield(void) {
    sched_yield();
}

/* Between two looks at a value that another thread writes. */
static inline void tbn_relax(void) {
#if defined(TBN_X86)
    __builtin_ia32_pause();
#elif defined(TBN_ARM)
    __asm__ volatile("yield");
#endif
}

#endif

#endif
