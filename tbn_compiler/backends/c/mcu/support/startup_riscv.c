/* What runs before main on a RISC-V core: the stack, initialised memory, the floating-point unit, faults. */
#include "semihosting.h"

extern uint32_t data_load[], data_start[], data_end[], bss_start[], bss_end[];

int main(void);
void reset(void);
void start(void);

__attribute__((aligned(4))) static void fault(void)
{
    semihosting_fail("the processor faulted: an access that is not aligned or outside memory, or an unknown instruction\n");
}

/* The first instructions. What is thread-local in the C library, which is errno, lies behind tp. */
__attribute__((naked, section(".vectors"), used)) void reset(void)
{
    __asm__ volatile(
        ".option push\n\t.option norelax\n\tla gp, __global_pointer$\n\t.option pop\n\t"
        "la sp, stack_top\n\tla tp, thread_start\n\tj start");
}

__attribute__((used)) void start(void)
{
    const uint32_t *source = data_load;

    for (uint32_t *target = data_start; target < data_end; ++target) {
        *target = *source++;
    }
    for (uint32_t *target = bss_start; target < bss_end; ++target) {
        *target = 0;
    }
    __asm__ volatile(".option arch, +zicsr\n\tcsrw mtvec, %0" : : "r"(fault));
#ifdef __riscv_flen
    __asm__ volatile("csrs mstatus, %0" : : "r"(1u << 13)); /* FS: the floating-point unit is on */
#endif
    main();
    semihosting_call(SEMIHOSTING_EXIT, SEMIHOSTING_EXIT_DONE);
    for (;;) {
    }
}
