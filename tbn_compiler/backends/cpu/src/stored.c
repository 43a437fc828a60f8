/*
 * Plans that files hold: everything that a plan points to in one piece, with a list of its pointers, so that a program
 * without Python can load it (backends/cpu/stored.py writes them).
 *
 * A piece is checked and copied once, when it is first called with; later calls find the plan by its address.
 */
#if !defined(_WIN32)
#define _GNU_SOURCE /* RTLD_DEFAULT */
#include <dlfcn.h>
#endif

#include <stdlib.h>
#include <string.h>

#include "scratch.h"
#include "system.h"
#include "tbn_cpu.h"

struct pointer {
    uint64_t at; /* where it lies in the body */
    uint64_t kind;
    uint64_t target;
};

enum { TO_BODY, TO_KERNELS, TO_DOTS, TO_FUNCTION };

struct header {
    char magic[8];
    uint32_t version; /* TBN_INTERFACE */
    uint16_t kind, root; /* of the plan itself, at the beginning of the body; its bytes */
    char level[16];
    uint64_t pointers, begin, bytes; /* how many; where the body begins, and its size */
    uint64_t sum;                    /* of all words behind the header */
};

struct restored {
    const void *source;
    struct header header; /* as it was: another plan may lie at the same address later */
    const void *plan;
    struct restored *next;
};

enum { CHAINS = 256 };

static tbn_pointer chains[CHAINS];
static tbn_lock lock = TBN_LOCK_INITIALIZER;

static const void *function(uint64_t number) {
    static int (*const linear[])(const struct tbn_linear *, const float *, float *, size_t, const float *,
                                 const float *, const float *, size_t) = {tbn_linear, tbn_linear_dots};
    static int (*const conv[])(const struct tbn_conv *, const float *, float *, size_t, size_t, size_t, const float *,
                               const float *, const float *, size_t) = {tbn_conv, tbn_conv_dots};
    const void *found = NULL;
    /* ISO C has no cast from functions to objects; their addresses are copied. */
    if (number < 2) memcpy(&found, &linear[number], sizeof found);
    else if (number < 4) memcpy(&found, &conv[number - 2], sizeof found);
    return found;
}

static uint64_t checksum(const unsigned char *bytes, uint64_t size) {
    uint64_t sum = 0, word;
    for (uint64_t i = 0; i < size / sizeof word; i++) {
        memcpy(&word, bytes + i * sizeof word, sizeof word);
        sum += word * (2 * i + 1);
    }
    return sum;
}

/* Whether all offsets lie where they should. */
static bool is_sound(const struct header *header, const struct pointer *pointers, uint64_t size, uint64_t root) {
    if (header->root != root || header->bytes < root || header->begin > size || header->bytes > size - header->begin)
        return false;
    if (header->begin < sizeof *header || !memchr(header->level, '\0', sizeof header->level)) return false;
    if (header->pointers > (header->begin - sizeof *header) / sizeof *pointers) return false;
    for (uint64_t i = 0; i < header->pointers; i++) {
        const struct pointer *each = &pointers[i];
        if (header->bytes < sizeof(void *) || each->at > header->bytes - sizeof(void *)) return false;
        if (each->kind > TO_FUNCTION || (each->kind == TO_BODY && each->target >= header->bytes)) return false;
        if (each->kind == TO_FUNCTION && !function(each->target)) return false;
    }
    return true;
}

static const void *restore(const unsigned char *source, const struct header *header, size_t size, size_t root,
                           enum tbn_plan_kind kind, const char **why) {
    const struct pointer *pointers = (const void *)(source + sizeof *header);
    if (header->version != TBN_INTERFACE) {
        *why = "tbn_cpu: the plan was stored by another version of tbn_compiler: store it again";
        return NULL;
    }
    if (size % sizeof(uint64_t) || header->kind != kind || !is_sound(header, pointers, size, root) ||
        checksum(source + sizeof *header, size - sizeof *header) != header->sum) {
        *why = "tbn_cpu: the stored plan is damaged";
        return NULL;
    }
    const struct tbn_kernels *kernels = tbn_level(header->level);
    if (!kernels) {
        *why = "tbn_cpu: the plan was stored for a vector level that this processor does not have";
        return NULL;
    }
    unsigned char *body = tbn_allocate(header->bytes);
    if (!body) {
        *why = "tbn_cpu: no memory for a plan";
        return NULL;
    }
    memcpy(body, source + header->begin, header->bytes);
    for (uint64_t i = 0; i < header->pointers; i++) {
        const void *target = pointers[i].kind == TO_BODY      ? body + pointers[i].target
                             : pointers[i].kind == TO_KERNELS ? (const void *)kernels
                             : pointers[i].kind == TO_DOTS    ? (const void *)tbn_dots_of(kernels)
                                                              : function(pointers[i].target);
        memcpy(body + pointers[i].at, &target, sizeof target);
    }
    return body;
}

static const void *find(const struct restored *entry, const struct header *header, enum tbn_plan_kind kind) {
    if (header->kind != kind) return NULL;
    for (; entry; entry = entry->next)
        if (entry->source == header && !memcmp(&entry->header, header, sizeof *header)) return entry->plan;
    return NULL;
}

const void *tbn_restore(const void *source, size_t size, size_t root, enum tbn_plan_kind kind, const char **why) {
    static const char magic[8] = "tbnplan";
    const struct header *header = source;
    *why = "tbn_cpu: the plan is not one that this process made";
    if (size < sizeof *header || (uintptr_t)source % sizeof(uint64_t) || memcmp(header->magic, magic, sizeof magic))
        return NULL;
    tbn_pointer *chain = &chains[(uintptr_t)source / 64 % CHAINS];
    const void *plan = find(tbn_get_pointer(chain), header, kind);
    if (plan) return plan;
    tbn_acquire(&lock);
    struct restored *first = tbn_get_pointer(chain);
    plan = find(first, header, kind);
    if (!plan && (plan = restore(source, header, size, root, kind, why))) {
        struct restored *entry = malloc(sizeof *entry);
        if (entry) { /* kept until the process ends, as models are */
            *entry = (struct restored){source, *header, plan, first};
            tbn_set_pointer(chain, entry);
        }
    }
    tbn_release(&lock);
    return plan;
}

/* The address of a function of the libtorch that the program has loaded. */
static void *exported(const char *name, bool *complete) {
#if defined(_WIN32)
    const HMODULE library = GetModuleHandleA("torch_cpu.dll");
    const FARPROC found = library ? GetProcAddress(library, name) : NULL;
    void *address = NULL;
    memcpy(&address, &found, sizeof address);
#else
    void *address = dlsym(RTLD_DEFAULT, name);
#endif
    *complete = *complete && address;
    return address;
}

int tbn_define_operators(void) {
    static struct tbn_torch functions;
    static const char *const names[] = {TBN_TORCH_FUNCTIONS};
    int32_t (*init)(const char *, const char *, uint32_t, void **) = NULL;
    int32_t (*define)(void *, const char *) = NULL;
    bool complete = true;
    void *library = NULL, *found[sizeof names / sizeof *names];
    void *init_address = exported("aoti_torch_library_init_def", &complete);
    void *define_address = exported("aoti_torch_library_def", &complete);
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) found[i] = exported(names[i], &complete);
    if (!complete) return 1;
    memcpy(&init, &init_address, sizeof init);
    memcpy(&define, &define_address, sizeof define);
    memcpy(&functions, found, sizeof functions);
    if (init("tbn_cpu", __FILE__, __LINE__, &library)) return 2;
    for (const char *const *schema = tbn_schemas(); *schema; schema++)
        if (define(library, *schema)) return 2;
    return tbn_register(&functions) ? 2 : 0;
}

const char *const *tbn_schemas(void) {
    static const char *const schemas[] = {
        "linear(Tensor input, Tensor plan, int out_features) -> Tensor",
        "conv(Tensor input, Tensor plan, int out_channels, int dims, int kernel_height, int kernel_width, "
        "int stride_height, int stride_width, int padding_height, int padding_width, int dilation_height, "
        "int dilation_width) -> Tensor",
        "network(Tensor input, Tensor plan, int number) -> Tensor",
        "attention(Tensor query, Tensor key, Tensor value, float scale, bool by_width, "
        "bool causal) -> Tensor",
        "masked_attention(Tensor query, Tensor key, Tensor value, Tensor mask, float scale, bool by_width) -> Tensor",
        "dense(Tensor input) -> Tensor",
        NULL,
    };
    return schemas;
}
