#include "tbn_cpu.h"

#include <string.h>

#if defined(TBN_X86)

#if defined(TBN_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Whether the processor has AMX for bytes, and the system lets this process use it. */
static int has_amx(void) {
    enum { PERMISSION = 0x1023, TILE_DATA = 18 }; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & 1) || !(d >> 25 & 1)) /* AMX-TILE, AMX-INT8 */
        return 0;
    return syscall(SYS_arch_prctl, PERMISSION, TILE_DATA) == 0;
}
#endif

static const struct tbn_kernels *find(const char *name) {
    __builtin_cpu_init();
    const int avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                       __builtin_cpu_supports("bmi2");
    const int vnni = avx512 && __builtin_cpu_supports("avx512vnni");
#if defined(TBN_AMX)
    if (strcmp(name, "avx512amx") == 0 && vnni && has_amx())
        return &tbn_avx512amx;
#endif
    if (strcmp(name, "avx512vnni") == 0 && vnni)
        return &tbn_avx512vnni;
    if (strcmp(name, "avx512") == 0 && avx512)
        return &tbn_avx512;
    if (strcmp(name, "avx2") == 0 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("bmi2"))
        return &tbn_avx2;
    return NULL;
}
#elif defined(TBN_ARM)
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

const struct tbn_dots *tbn_dots_of(const struct tbn_kernels *kernels) {
    return kernels->dots;
}

int tbn_has_dots(const struct tbn_kernels *kernels) {
    return kernels->dots != NULL;
}

int tbn_dots_by_rows(const struct tbn_kernels *kernels) {
    return kernels->dots && kernels->dots->by_rows;
}

int tbn_has_limbs(const struct tbn_kernels *kernels) {
    return kernels->dots && kernels->dots->combine;
}

int tbn_keeps_floats(const struct tbn_kernels *kernels) {
    return kernels->dots && kernels->dots->multiply_floats;
}
