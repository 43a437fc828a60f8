/*
 * Layers as operators of PyTorch: kernels that the dispatcher calls without Python.
 *
 * They are registered through the C functions that libtorch exports for this (torch/csrc/inductor/aoti_torch/c/shim.h).
 * The caller finds them at run time, so that this library is linked against nothing of PyTorch and one build serves its
 * versions. Operands arrive as 64-bit values, tensors as handles that a kernel has to delete; the result takes the
 * first place.
 */
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "tbn_cpu.h"

enum { FLOAT32 = 6, CPU = 0, MAX_DIMS = 64 };

static struct tbn_torch torch;

int tbn_register(const struct tbn_torch *functions) {
    void *library = NULL;
    torch = *functions;
    if (torch.library_init_impl("tbn_cpu", "CPU", __FILE__, __LINE__, &library)) return 1;
    /* The library is never deleted: its kernels stay until the process ends. */
    return torch.library_impl(library, "linear", tbn_call_linear) ||
           torch.library_impl(library, "conv", tbn_call_conv) ||
           torch.library_impl(library, "network", tbn_call_network);
}

/* One call: what it has to delete, and what it knows of its input. */
struct call {
    void *input, *plan;
    const void *bytes; /* of the plan */
    const struct tbn_bound *bound; /* the same, of a layer */
    int64_t dims, numel;
    int64_t sizes[MAX_DIMS], strides[MAX_DIMS];
    bool contiguous;
};

/* Raises RuntimeError: throws an exception of C++ through the caller, which owns nothing else. */
static _Noreturn void fail(const struct call *call, const char *message) {
    torch.delete_tensor(call->input);
    torch.delete_tensor(call->plan);
    torch.check(false, "tbn_cpu", __FILE__, __LINE__, message);
    abort();
}

/* Takes the operands of a call whose plan has `size` bytes and begins with its own address. */
static void begin(struct call *call, const uint64_t *stack, size_t size, enum tbn_plan_kind kind) {
    void *bytes = NULL;
    int64_t numel = 0, *sizes = NULL, *strides = NULL;
    int32_t dtype = 0, failed;
    call->input = (void *)(uintptr_t)stack[0];
    call->plan = (void *)(uintptr_t)stack[1];
    failed = torch.get_numel(call->plan, &numel) || torch.get_data_ptr(call->plan, &bytes);
    if (failed) fail(call, "tbn_cpu: the plan has no memory");
    /* A plan is good at its own place only: bytes that were copied, or come from another process, are stored ones. */
    if (numel == (int64_t)size && *(const void *const *)bytes == bytes) {
        call->bytes = bytes;
    } else {
        const char *why = NULL;
        call->bytes = tbn_restore(bytes, (size_t)numel, size, kind, &why);
        if (!call->bytes) fail(call, why);
    }
    call->bound = call->bytes;
    failed = torch.get_dim(call->input, &call->dims) || torch.get_sizes(call->input, &sizes) ||
             torch.get_strides(call->input, &strides) || torch.get_numel(call->input, &call->numel) ||
             torch.get_dtype(call->input, &dtype) || torch.is_contiguous(call->input, &call->contiguous);
    if (failed || dtype != FLOAT32 || call->dims < 1 || call->dims > MAX_DIMS)
        fail(call, "tbn_cpu: the input must be float32 with at least one dimension");
    memcpy(call->sizes, sizes, (size_t)call->dims * sizeof *sizes);
    memcpy(call->strides, strides, (size_t)call->dims * sizeof *strides);
}

/* A new tensor, with the channels of images innermost if `last`. */
static void *make(const struct call *call, const int64_t *sizes, bool last) {
    static const int order[4] = {1, 3, 2, 0}; /* innermost first */
    int64_t strides[MAX_DIMS], step = 1;
    void *tensor = NULL;
    for (int64_t place = 0; place < call->dims; place++) {
        int64_t axis = last ? order[place] : call->dims - 1 - place;
        strides[axis] = step;
        step *= sizes[axis] > 1 ? sizes[axis] : 1;
    }
    if (torch.empty_strided(call->dims, sizes, strides, FLOAT32, CPU, 0, &tensor))
        fail(call, "tbn_cpu: no memory for a tensor");
    return tensor;
}

static void *data(const struct call *call, void *tensor) {
    void *pointer = NULL;
    if (torch.get_data_ptr(tensor, &pointer)) fail(call, "tbn_cpu: a tensor has no memory");
    return pointer;
}

/* Puts a dense copy in the place of the input. */
static void densify(struct call *call) {
    void *copy = make(call, call->sizes, false);
    if (torch.copy(copy, call->input, 0)) {
        torch.delete_tensor(copy);
        fail(call, "tbn_cpu: the input cannot be copied");
    }
    torch.delete_tensor(call->input);
    call->input = copy;
}

/* Brings images in planes into the other format; deletes the tensor that it is given. */
static void *interleave(const struct call *call, void *planes, const int64_t *sizes) {
    void *images = make(call, sizes, true);
    int32_t failed = torch.copy(images, planes, 0);
    torch.delete_tensor(planes);
    if (failed) {
        torch.delete_tensor(images);
        fail(call, "tbn_cpu: the result cannot be copied");
    }
    return images;
}

static size_t threads(void) {
    uint32_t count = 1;
    return torch.get_num_threads(&count) ? 1 : count;
}

static void end(const struct call *call, uint64_t *stack, void *out, int status) {
    if (status != TBN_OK) {
        torch.delete_tensor(out);
        fail(call, "tbn_cpu: no memory to work in");
    }
    torch.delete_tensor(call->input);
    torch.delete_tensor(call->plan);
    stack[0] = (uint64_t)(uintptr_t)out;
}

void tbn_call_linear(uint64_t *stack, uint64_t inputs, uint64_t outputs) {
    struct call call;
    const struct tbn_bound *bound;
    int64_t sizes[MAX_DIMS];
    (void)inputs, (void)outputs;
    begin(&call, stack, sizeof *bound, TBN_LAYER_PLAN);
    bound = call.bound;
    if (bound->dims != 0 || (size_t)call.sizes[call.dims - 1] != bound->inputs)
        fail(&call, "tbn_cpu::linear: the input does not fit the layer");
    if (!call.contiguous) densify(&call);
    memcpy(sizes, call.sizes, (size_t)call.dims * sizeof *sizes);
    sizes[call.dims - 1] = (int64_t)bound->outputs;
    size_t tokens = (size_t)call.numel / bound->inputs;
    const struct tbn_form *form = &bound->forms[tokens >= TBN_MIN_BATCH];
    void *out = make(&call, sizes, false);
    int status = form->linear(form->layer, data(&call, call.input), data(&call, out), tokens, bound->alpha, bound->bias,
                              bound->scale, threads());
    end(&call, stack, out, status);
}

/* Whether images that are not contiguous have their channels innermost; as PyTorch decides it. */
static bool is_last(const struct call *call) {
    static const int order[4] = {1, 3, 2, 0};
    int64_t step = 1;
    if (call->contiguous || call->dims != 4) return false;
    for (int place = 0; place < 4; place++) {
        int axis = order[place];
        if (call->sizes[axis] == 1) continue;
        if (call->strides[axis] != step) return false;
        step *= call->sizes[axis];
    }
    return true;
}

void tbn_call_conv(uint64_t *stack, uint64_t inputs, uint64_t outputs) {
    struct call call;
    const struct tbn_bound *bound;
    int64_t sizes[MAX_DIMS];
    (void)inputs, (void)outputs;
    begin(&call, stack, sizeof *bound, TBN_LAYER_PLAN);
    bound = call.bound;
    int64_t d = bound->dims, channels = call.dims - 1 - d; /* the axis of the channels */
    if (d < 1 || channels < 0 || channels > 1 || (size_t)call.sizes[channels] != bound->inputs)
        fail(&call, "tbn_cpu::conv: the input does not fit the layer");
    bool last = is_last(&call), direct = last && bound->forms[1].layer;
    if (!call.contiguous && !direct) densify(&call);
    const struct tbn_form *form = &bound->forms[direct];
    const struct tbn_conv *layer = form->layer;
    memcpy(sizes, call.sizes, (size_t)call.dims * sizeof *sizes);
    sizes[channels] = (int64_t)bound->outputs;
    for (int64_t axis = channels + 1; axis < call.dims; axis++) {
        int of = (int)(axis - channels - 1 + 2 - d); /* a layer of one dimension has a height of 1 */
        size_t size = (size_t)call.sizes[axis], reach = layer->dilation[of] * (layer->kernel[of] - 1);
        if (size == 0 || size + 2 * layer->padding[of] <= reach)
            fail(&call, "tbn_cpu::conv: the kernel does not fit the input");
        sizes[axis] = (int64_t)tbn_output_size(layer, of, size);
    }
    void *out = make(&call, sizes, direct);
    int status = form->conv(layer, data(&call, call.input), data(&call, out), channels ? (size_t)call.sizes[0] : 1,
                            d == 2 ? (size_t)call.sizes[channels + 1] : 1, (size_t)call.sizes[call.dims - 1],
                            bound->alpha, bound->bias, bound->scale, threads());
    if (status == TBN_OK && last && !direct) out = interleave(&call, out, sizes);
    end(&call, stack, out, status);
}

void tbn_call_network(uint64_t *stack, uint64_t inputs, uint64_t outputs) {
    struct call call;
    const struct tbn_network *network;
    int64_t sizes[4];
    size_t found[2];
    (void)inputs, (void)outputs;
    begin(&call, stack, sizeof *network, TBN_NETWORK_PLAN);
    network = call.bytes;
    if (call.dims != network->dims || call.sizes[1] != (int64_t)network->values[0].channels)
        fail(&call, "tbn_cpu::network: the input does not fit the network");
    bool last = is_last(&call);
    if (!call.contiguous && !last) densify(&call);
    size_t height = call.dims == 4 ? (size_t)call.sizes[2] : 1, width = call.dims == 4 ? (size_t)call.sizes[3] : 1;
    int status = tbn_network_sizes(network, height, width, found);
    if (status == TBN_MISFIT) fail(&call, "tbn_cpu::network: a kernel does not fit the input");
    sizes[0] = call.sizes[0];
    sizes[1] = (int64_t)network->values[network->steps[network->step_count - 1].output].channels;
    sizes[2] = (int64_t)found[0];
    sizes[3] = (int64_t)found[1];
    if (network->out_dims == 2) sizes[1] *= sizes[2] * sizes[3];
    call.dims = network->out_dims;
    void *out = make(&call, sizes, last && call.dims == 4);
    if (status == TBN_OK)
        status = tbn_network(network, data(&call, call.input), last, data(&call, out), (size_t)call.sizes[0], height,
                             width, threads());
    end(&call, stack, out, status);
}
