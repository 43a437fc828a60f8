/*
 * The 32-bit timer of an emulated board, counting up at a known rate for each instruction: under qemu -icount every
 * instruction takes the same time.
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
    TIMER_REGISTER(0x40008000u) = 1; /* START */
}

static inline uint32_t timer_now(void)
{
    TIMER_REGISTER(0x40008040u) = 1; /* CAPTURE into CC[0] */
    return TIMER_REGISTER(0x40008540u);
}

#elif defined BOARD_MPS3

/* The system counter of the SSE-300: 32 MHz. */
static inline void timer_start(void)
{
    TIMER_REGISTER(0x58100000u) = 1; /* CNTCR: count */
}

static inline uint32_t timer_now(void)
{
    return TIMER_REGISTER(0x58100008u); /* CNTCV, the lower half */
}

#elif defined BOARD_VIRT

/* The processor's own count of instructions, which qemu gives in nanoseconds. */
static inline void timer_start(void)
{
}

static inline uint32_t timer_now(void)
{
    uint32_t count;

    __asm__ volatile(".option arch, +zicsr\n\tcsrr %0, minstret" : "=r"(count) : : "memory");
    return count;
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
    TIMER_REGISTER(TIMER_BASE) = 1;               /* CTRL: run, no interrupt */
}

static inline uint32_t timer_now(void)
{
    return 0u - TIMER_REGISTER(TIMER_BASE + 4);
}

#endif

#endif /* TBN_TIMER_H */
