#include "tbn_cpu.h"

#include <string.h>

#if defined(__x86_64__)
static const struct tbn_kernels *find(const char *name) {
    __builtin_cpu_init();
    if (strcmp(name, "avx512") == 0 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx2") &&
        __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
        return &tbn_avx512;
    if (strcmp(name, "avx2") == 0 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2"))
        return &tbn_avx2;
    return NULL;
}
#elif defined(__aarch64__)
static const struct tbn_kernels *find(const char *name) {
    return strcmp(name, "neon") == 0 ? &tbn_neon : NULL; /* every such machine has it */
}
#else
static const struct tbn_kernels *find(const char *name) {
    (void)name;
    return NULL;
}
#endif

int tbn_interface(void) {
    return TBN_INTERFACE;
}

const struct tbn_kernels *tbn_level(const char *name) {
    return strcmp(name, "portable") == 0 ? &tbn_portable : find(name);
}
