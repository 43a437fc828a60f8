/*
 * Runs a model on the vectors of a file and measures each run. Given on the command line of the compiler:
 *   MODEL_HEADER                      the model's header
 *   MODEL_RUN(input, output, scratch) a call of the model; input and output hold all its inputs and outputs, one behind
 *                                     the other, each from a whole word on
 *   MODEL_STATE, MODEL_INIT           the type of the model's state and the function that fills it, if it has one
 *   MODEL_INPUT_WORDS, MODEL_OUTPUT_WORDS size of them; MODEL_SCRATCH_BYTES memory that the caller provides
 *
 * Reads input.bin, what input holds for each vector. Writes output.bin, their results, and measured.bin: two words for each vector,
 * timer ticks and bytes of stack.
 */
#include MODEL_HEADER

#include "semihosting.h"
#include "timer.h"

/* An array needs an element. */
static uint32_t input[MODEL_INPUT_WORDS];
static uint32_t output[MODEL_OUTPUT_WORDS];
static double scratch[MODEL_SCRATCH_BYTES / sizeof(double) + 1]; /* of the largest alignment that a model asks for */

#ifdef MODEL_STATE
static MODEL_STATE state;
static MODEL_STATE before; /* the run that is measured, for the second one of the same step */
#endif

extern uint32_t bss_end[];

#define PAINT 0x5a5aa5a5u
#define PAINTED_BYTES 8192u /* at most, below the caller's frame */

static uint32_t open_file(const char *name, uint32_t length, uint32_t mode)
{
    const uintptr_t arguments[3] = {(uintptr_t)name, mode, length};
    const int32_t handle = semihosting_call(SEMIHOSTING_OPEN, (uintptr_t)arguments);

    if (handle < 0) {
        semihosting_fail("cannot open a file of the host\n");
    }
    return (uint32_t)handle;
}

/* Bytes that were not read or written. */
static uint32_t transfer(uint32_t operation, uint32_t file, const void *data, uint32_t bytes)
{
    const uintptr_t arguments[3] = {file, (uintptr_t)data, bytes};

    return (uint32_t)semihosting_call(operation, (uintptr_t)arguments);
}

static void write_all(uint32_t file, const void *data, uint32_t bytes)
{
    if (transfer(SEMIHOSTING_WRITE, file, data, bytes) != 0) {
        semihosting_fail("cannot write a file of the host\n");
    }
}

/* One run. Not inlined, so that the stack of every run starts at the same place; only the call itself is timed. */
__attribute__((noinline)) static uint32_t timed_run(void)
{
    const uint32_t start = timer_now();
    uint32_t passed;

    MODEL_RUN(input, output, scratch);
    passed = timer_now() - start;
    if (timer_overrun()) {
        semihosting_fail("a run takes more instructions than the board's timer can count\n");
    }
    return passed;
}

__attribute__((noinline)) static uint32_t timed_nothing(void)
{
    const uint32_t start = timer_now();

    __asm__ volatile("" ::: "memory");
    return timer_now() - start;
}

static uint32_t *stack_pointer(void)
{
    uint32_t *pointer;

#ifdef __riscv
    __asm__ volatile("mv %0, sp" : "=r"(pointer));
#else
    __asm__ volatile("mov %0, sp" : "=r"(pointer));
#endif
    return pointer;
}

/* Run once more on painted stack; the lowest word that lost its paint is how deep the stack went. */
__attribute__((noinline)) static uint32_t stack_bytes(void)
{
    uint32_t *const top = stack_pointer();
    uint32_t *bottom = bss_end;
    uint32_t *word;

    if ((uintptr_t)top - (uintptr_t)bottom > PAINTED_BYTES) {
        bottom = top - PAINTED_BYTES / sizeof(uint32_t);
    }
    for (word = bottom; word < top; ++word) {
        *(volatile uint32_t *)word = PAINT;
    }
    MODEL_RUN(input, output, scratch);
    for (word = bottom; word < top && *(volatile uint32_t *)word == PAINT; ++word) {
    }
    if (word == bottom) {
        semihosting_fail("the model needs more stack than there is or than is watched\n");
    }
    return (uint32_t)((uintptr_t)top - (uintptr_t)word);
}

int main(void)
{
    const uint32_t inputs = open_file("input.bin", 9, SEMIHOSTING_MODE_RB);
    const uint32_t outputs = open_file("output.bin", 10, SEMIHOSTING_MODE_WB);
    const uint32_t results = open_file("measured.bin", 12, SEMIHOSTING_MODE_WB);

#ifdef MODEL_STATE
    MODEL_INIT(&state);
#endif
    timer_start();
    while (transfer(SEMIHOSTING_READ, inputs, input, sizeof input) == 0) {
        const uint32_t overhead = timed_nothing();
        uint32_t measured[2];

#ifdef MODEL_STATE
        before = state;
#endif
        timer_start();
        measured[0] = timed_run() - overhead;
#ifdef MODEL_STATE
        state = before;
#endif
        measured[1] = stack_bytes();

        write_all(outputs, output, sizeof output);
        write_all(results, measured, sizeof measured);
    }
    return 0;
}
