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

#else

/* CMSDK timer 0 of the MPS2 boards: 25 MHz, counting down. */
static inline void timer_start(void)
{
    TIMER_REGISTER(0x40000008u) = 0xffffffffu; /* RELOAD */
    TIMER_REGISTER(0x40000004u) = 0xffffffffu; /* VALUE */
    TIMER_REGISTER(0x40000000u) = 1;           /* CTRL: run, no interrupt */
}

static inline uint32_t timer_now(void)
{
    return 0u - TIMER_REGISTER(0x40000004u);
}

#endif

#endif /* TBN_TIMER_H */
