/*
 * The timer of an emulated board, counting up at a known rate for each instruction: under qemu -icount every instruction
 * takes the same time. timer_start begins anew; timer_overrun says whether more has passed since then than it can hold.
 */
#ifndef TBN_TIMER_H
#define TBN_TIMER_H

#include <stdint.h>

#define TIMER_REGISTER(address) (*(volatile uint32_t *)(address))

#ifdef BOARD_MICROBIT

/* TIMER0 of the nRF51: 16 MHz. */
static inline void timer_start(void)
{
    TIMER_REGISTER(0x40008508u) = 3; /* BITMODE: 32 bits */
    TIMER_REGISTER(0x40008510u) = 0; /* PRESCALER: none */
    TIMER_REGISTER(0x40008544u) = 0xffffffffu; /* CC[1] */
    TIMER_REGISTER(0x4000800cu) = 1; /* CLEAR */
    TIMER_REGISTER(0x40008144u) = 0; /* EVENTS_COMPARE[1] */
    TIMER_REGISTER(0x40008000u) = 1; /* START */
}

static inline uint32_t timer_now(void)
{
    TIMER_REGISTER(0x40008040u) = 1; /* CAPTURE into CC[0] */
    return TIMER_REGISTER(0x40008540u);
}

static inline int timer_overrun(void)
{
    return TIMER_REGISTER(0x40008144u) != 0;
}

#elif defined BOARD_MPS3

/* The system counter of the SSE-300: 32 MHz. */
static inline void timer_start(void)
{
    TIMER_REGISTER(0x58100000u) = 0; /* CNTCR: stop */
    TIMER_REGISTER(0x58100008u) = 0; /* CNTCV */
    TIMER_REGISTER(0x5810000cu) = 0;
    TIMER_REGISTER(0x58100000u) = 1; /* CNTCR: count */
}

static inline uint32_t timer_now(void)
{
    return TIMER_REGISTER(0x58100008u); /* CNTCV, the lower half */
}

static inline int timer_overrun(void)
{
    return TIMER_REGISTER(0x5810000cu) != 0;
}

#elif defined BOARD_VIRT

/* The processor's own count of instructions, which qemu gives in nanoseconds, 64 for each. */
static uint64_t timer_first;

static inline uint64_t timer_count(void)
{
    uint32_t upper, lower, again;

    do {
        __asm__ volatile(".option arch, +zicsr\n\tcsrr %0, minstreth" : "=r"(upper) : : "memory");
        __asm__ volatile(".option arch, +zicsr\n\tcsrr %0, minstret" : "=r"(lower) : : "memory");
        __asm__ volatile(".option arch, +zicsr\n\tcsrr %0, minstreth" : "=r"(again) : : "memory");
    } while (upper != again);
    return (uint64_t)upper << 32 | lower;
}

static inline void timer_start(void)
{
    timer_first = timer_count();
}

static inline uint32_t timer_now(void)
{
    return (uint32_t)((timer_count() - timer_first) >> 6);
}

static inline int timer_overrun(void)
{
    return (timer_count() - timer_first) >> 38 != 0;
}

#else

/* CMSDK timer 0 of the MPS2 boards, 25 MHz, or 20 MHz where addresses are secure ones; counting down. */
#ifdef BOARD_MPS2_SECURE
#define TIMER_BASE 0x50000000u
#else
#define TIMER_BASE 0x40000000u
#endif

static inline void timer_start(void)
{
    TIMER_REGISTER(TIMER_BASE + 8) = 0xffffffffu; /* RELOAD */
    TIMER_REGISTER(TIMER_BASE + 4) = 0xffffffffu; /* VALUE */
    TIMER_REGISTER(TIMER_BASE + 12) = 1;          /* INTCLEAR */
    TIMER_REGISTER(TIMER_BASE) = 9;               /* CTRL: run, and note in INTSTATUS that 0 was reached */
}

static inline int timer_overrun(void)
{
    return TIMER_REGISTER(TIMER_BASE + 12) != 0;
}

static inline uint32_t timer_now(void)
{
    return 0u - TIMER_REGISTER(TIMER_BASE + 4);
}

#endif

#endif /* TBN_TIMER_H */
