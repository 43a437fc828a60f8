/*
 * What compilers and systems do each in a way of their own; the rest is ISO C11. GCC and clang have attributes, vectors
 * and the vector levels. TBN_ISO_C keeps them to what other compilers take, MSVC among them, so that tests can compile
 * that on any machine; TBN_INTERLOCKED makes atomic values of the functions that MSVC has in place of <stdatomic.h>.
 */
#ifndef TBN_PLATFORM_H
#define TBN_PLATFORM_H

#include <stddef.h>

#if defined(_MSC_VER) && !defined(__clang__)
#pragma fp_contract(off) /* exact results: no contraction of products and sums */
#define TBN_INTERLOCKED 1
#ifdef _ISO_VOLATILE
#error "compile with /volatile:ms: loads and stores of values that threads share are ordered"
#endif
#endif

#if (defined(__GNUC__) || defined(__clang__)) && !defined(TBN_ISO_C)
#define TBN_GNU_C 1
#endif

/* Levels that this library has beside the portable one. Stacks of Windows are not aligned for their vectors in GCC. */
#if defined(TBN_GNU_C) && !defined(_WIN32)
#if defined(__x86_64__)
#define TBN_X86 1
#elif defined(__aarch64__)
#define TBN_ARM 1
#endif
#endif

/* Compilers that know AMX, on systems that let a process use it. */
#if defined(TBN_X86) && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define TBN_AMX 1
#endif

#if defined(_WIN32)
#define TBN_EXPORT __declspec(dllexport)
#elif defined(TBN_GNU_C)
#define TBN_EXPORT __attribute__((visibility("default")))
#else
#define TBN_EXPORT
#endif

/* A function that is inlined for the constants that it gets. */
#if defined(TBN_GNU_C)
#define TBN_INLINE static inline __attribute__((always_inline))
#elif defined(_MSC_VER)
#define TBN_INLINE static __forceinline
#else
#define TBN_INLINE static inline
#endif

#if defined(_WIN32) || (defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__)
#define TBN_LITTLE_ENDIAN 1
#endif

/*
 * Values that threads share: a counter, the state of a worker, a pointer. A load sees what was written before the store
 * that it reads.
 */
#if defined(TBN_INTERLOCKED)

#include <intrin.h>

typedef struct {
    volatile long long value;
} tbn_counter;

typedef struct {
    volatile long value;
} tbn_state;

typedef struct {
    void *volatile value;
} tbn_pointer;

/* The next number, from 0 on. */
static inline size_t tbn_take_number(tbn_counter *counter) {
    return (size_t)_InterlockedExchangeAdd64(&counter->value, 1);
}

/* How many numbers were taken. */
static inline size_t tbn_taken(tbn_counter *counter) {
    return (size_t)counter->value;
}

static inline int tbn_get_state(tbn_state *state) {
    return (int)state->value;
}

static inline void tbn_set_state(tbn_state *state, int to) {
    _InterlockedExchange(&state->value, to);
}

/* Whether the state was `from`, and is `to` now. */
static inline int tbn_change_state(tbn_state *state, int from, int to) {
    return _InterlockedCompareExchange(&state->value, to, from) == from;
}

static inline void *tbn_get_pointer(tbn_pointer *pointer) {
    return pointer->value;
}

static inline void tbn_set_pointer(tbn_pointer *pointer, void *to) {
    _InterlockedExchangePointer(&pointer->value, to);
}

#else

#include <stdatomic.h>

typedef struct {
    atomic_size_t value;
} tbn_counter;

typedef struct {
    atomic_int value;
} tbn_state;

typedef struct {
    _Atomic(void *) value;
} tbn_pointer;

/* The next number, from 0 on. */
static inline size_t tbn_take_number(tbn_counter *counter) {
    return atomic_fetch_add(&counter->value, 1);
}

/* How many numbers were taken. */
static inline size_t tbn_taken(tbn_counter *counter) {
    return atomic_load(&counter->value);
}

static inline int tbn_get_state(tbn_state *state) {
    return atomic_load(&state->value);
}

static inline void tbn_set_state(tbn_state *state, int to) {
    atomic_store(&state->value, to);
}

/* Whether the state was `from`, and is `to` now. */
static inline int tbn_change_state(tbn_state *state, int from, int to) {
    return atomic_compare_exchange_strong(&state->value, &from, to);
}

static inline void *tbn_get_pointer(tbn_pointer *pointer) {
    return atomic_load_explicit(&pointer->value, memory_order_acquire);
}

static inline void tbn_set_pointer(tbn_pointer *pointer, void *to) {
    atomic_store_explicit(&pointer->value, to, memory_order_release);
}

#endif

#endif
