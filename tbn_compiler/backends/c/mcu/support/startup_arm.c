/* What runs before main on a Cortex-M: the vector table, initialised memory, the floating-point unit. */
#include "semihosting.h"

extern uint32_t data_load[], data_start[], data_end[], bss_start[], bss_end[], stack_top[];

int main(void);
void reset(void);

static void fault(void)
{
    semihosting_fail("the processor faulted: an access that is not aligned or outside memory, or an unknown instruction\n");
}

/* Kept in a function of its own: with the unit off, not even a prologue may save its registers. */
__attribute__((noinline)) static void run_main(void)
{
    main();
}

void reset(void)
{
    const uint32_t *source = data_load;

    for (uint32_t *target = data_start; target < data_end; ++target) {
        *target = *source++;
    }
    for (uint32_t *target = bss_start; target < bss_end; ++target) {
        *target = 0;
    }
#ifdef __ARM_FP
    *(volatile uint32_t *)0xe000ed88u |= 0xfu << 20; /* CPACR: full access to coprocessors 10 and 11 */
    __asm__ volatile("dsb\n\tisb");
#endif
    run_main();
    semihosting_call(SEMIHOSTING_EXIT, SEMIHOSTING_EXIT_DONE);
    for (;;) {
    }
}

/* The initial stack pointer, reset, and the exceptions: the emulated program enables no interrupts. */
__attribute__((section(".vectors"), used)) static const uintptr_t vectors[16] = {
    (uintptr_t)stack_top,
    (uintptr_t)reset,
    (uintptr_t)fault, /* NMI */
    (uintptr_t)fault, /* hard fault */
    (uintptr_t)fault, /* memory management */
    (uintptr_t)fault, /* bus fault */
    (uintptr_t)fault, /* usage fault */
};
