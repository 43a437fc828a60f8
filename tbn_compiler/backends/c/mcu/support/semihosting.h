/* The calls that a program under a debugger or an emulator makes to its host (semihosting of Arm and RISC-V). */
#ifndef TBN_SEMIHOSTING_H
#define TBN_SEMIHOSTING_H

#include <stdint.h>

enum {
    SEMIHOSTING_OPEN = 0x01,   /* {name, mode, length of name} -> handle, or -1 */
    SEMIHOSTING_CLOSE = 0x02,  /* {handle} */
    SEMIHOSTING_WRITE0 = 0x04, /* text that ends in a zero byte, for the host's console */
    SEMIHOSTING_WRITE = 0x05,  /* {handle, data, bytes} -> bytes that were not written */
    SEMIHOSTING_READ = 0x06,   /* {handle, data, bytes} -> bytes that were not read */
    SEMIHOSTING_EXIT = 0x18    /* a reason, one of the two below */
};

#define SEMIHOSTING_EXIT_DONE 0x20026u
#define SEMIHOSTING_EXIT_ERROR 0x20023u

/* Modes of SEMIHOSTING_OPEN, numbered as those of fopen. */
#define SEMIHOSTING_MODE_RB 1u
#define SEMIHOSTING_MODE_WB 5u

#ifdef __riscv

/* A breakpoint between two instructions that do nothing; all three are 4 bytes long and lie in one page. */
__attribute__((noinline, aligned(16))) static int32_t semihosting_call(uint32_t operation, uintptr_t argument)
{
    register uintptr_t a0 __asm__("a0") = operation;
    register uintptr_t a1 __asm__("a1") = argument;

    __asm__ volatile(
        ".balign 16\n\t.option push\n\t.option norvc\n\t"
        "slli x0, x0, 0x1f\n\tebreak\n\tsrai x0, x0, 7\n\t.option pop"
        : "+r"(a0)
        : "r"(a1)
        : "memory");
    return (int32_t)a0;
}

#else

static inline int32_t semihosting_call(uint32_t operation, uintptr_t argument)
{
    register uint32_t r0 __asm__("r0") = operation;
    register uintptr_t r1 __asm__("r1") = argument;

    __asm__ volatile("bkpt 0xab" : "+r"(r0) : "r"(r1) : "memory");
    return (int32_t)r0;
}

#endif

/* Print a message and end the emulation; the host's exit status is 1. */
static inline void semihosting_fail(const char *message)
{
    semihosting_call(SEMIHOSTING_WRITE0, (uintptr_t)message);
    semihosting_call(SEMIHOSTING_EXIT, SEMIHOSTING_EXIT_ERROR);
    for (;;) {
    }
}

#endif /* TBN_SEMIHOSTING_H */
