/*
 * Layers as operators of PyTorch: kernels that the dispatcher calls without Python.
 *
 * They are registered through the C functions that libtorch exports for this (torch/csrc/inductor/aoti_torch/c/shim.h).
 * The caller finds them at run time, so that this library is linked against nothing of PyTorch and one build serves its
 * versions. Operands arrive as 64-bit values, tensors as handles that a kernel has to delete; the result takes the
 * first place.
 */
#include <math.h>
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
           torch.library_impl(library, "network", tbn_call_network) ||
           torch.library_impl(library, "attention", tbn_call_attention) ||
           torch.library_impl(library, "masked_attention", tbn_call_masked_attention) ||
           torch.library_impl(library, "dense", tbn_call_dense);
}

/* One input of a call: what there is to delete, and what is known of it. */
struct call {
    struct call *all; /* the inputs of the call */
    size_t count;     /* of inputs */
    void *input, *plan; /* `plan` may be NULL */
    const void *bytes; /* of the plan */
    const struct tbn_bound *bound; /* the same, of a layer */
    int64_t dims, numel;
    int64_t sizes[MAX_DIMS], strides[MAX_DIMS];
    bool contiguous;
};

/* Raises RuntimeError: throws an exception of C++ through the caller, which owns nothing else. */
static _Noreturn void fail(const struct call *call, const char *message) {
    for (size_t i = 0; i < call->count; i++) {
        torch.delete_tensor(call->all[i].input);
        if (call->all[i].plan) torch.delete_tensor(call->all[i].plan);
    }
    torch.check(false, "tbn_cpu", __FILE__, __LINE__, message);
    abort();
}

/* Reads what there is to know of an input of floats; what is returned is not 0 if it is none. */
static int32_t read_input(struct call *call) {
    int64_t *sizes = NULL, *strides = NULL;
    int32_t dtype = 0;
    if (torch.get_dim(call->input, &call->dims) || torch.get_sizes(call->input, &sizes) ||
        torch.get_strides(call->input, &strides) || torch.get_numel(call->input, &call->numel) ||
        torch.get_dtype(call->input, &dtype) || torch.is_contiguous(call->input, &call->contiguous) ||
        dtype != FLOAT32 || call->dims < 1 || call->dims > MAX_DIMS)
        return 1;
    memcpy(call->sizes, sizes, (size_t)call->dims * sizeof *sizes);
    memcpy(call->strides, strides, (size_t)call->dims * sizeof *strides);
    return 0;
}

/* Takes the operands of a call whose plan has `size` bytes and begins with its own address. */
static void begin(struct call *call, const uint64_t *stack, size_t size, enum tbn_plan_kind kind) {
    void *bytes = NULL;
    int64_t numel = 0;
    call->all = call;
    call->count = 1;
    call->input = (void *)(uintptr_t)stack[0];
    call->plan = (void *)(uintptr_t)stack[1];
    if (torch.get_numel(call->plan, &numel) || torch.get_data_ptr(call->plan, &bytes))
        fail(call, "tbn_cpu: the plan has no memory");
    /* A plan is good at its own place only: bytes that were copied, or come from another process, are stored ones. */
    if (numel == (int64_t)size && *(const void *const *)bytes == bytes) {
        call->bytes = bytes;
    } else {
        const char *why = NULL;
        call->bytes = tbn_restore(bytes, (size_t)numel, size, kind, &why);
        if (!call->bytes) fail(call, why);
    }
    call->bound = call->bytes;
    if (read_input(call))
        fail(call, "tbn_cpu: the input must be float32 with at least one dimension: bound layers compute in float32");
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

/* Takes inputs that come without a plan. */
static void begin_plain(struct call *inputs, size_t count, const uint64_t *stack) {
    for (size_t i = 0; i < count; i++)
        inputs[i] = (struct call){.all = inputs, .count = count, .input = (void *)(uintptr_t)stack[i]};
    for (size_t i = 0; i < count; i++)
        if (read_input(&inputs[i])) fail(inputs, "tbn_cpu: inputs must be float32 with at least one dimension");
}

/* Copies an input to dense memory, reading it in the order in which it lies: it may come from far, as an image does. */
static void copy_in_order(const struct call *call, const float *from, float *to) {
    int64_t sizes[MAX_DIMS], steps[MAX_DIMS], strides[MAX_DIMS], place[MAX_DIMS] = {0}, step = call->numel;
    for (int64_t axis = 0; axis < call->dims; axis++) {
        int64_t at = axis;
        step /= call->sizes[axis];
        for (; at > 0 && strides[at - 1] < call->strides[axis]; at--) {
            sizes[at] = sizes[at - 1];
            steps[at] = steps[at - 1];
            strides[at] = strides[at - 1];
        }
        sizes[at] = call->sizes[axis];
        steps[at] = step;
        strides[at] = call->strides[axis];
    }
    const int64_t last = call->dims - 1, count = sizes[last], apart = strides[last], ahead = steps[last];
    for (int64_t done = 0; done < call->numel; done += count) {
        for (int64_t i = 0; i < count; i++)
            to[i * ahead] = from[i * apart];
        for (int64_t axis = last - 1; axis >= 0; axis--) { /* on to the next row */
            from += strides[axis];
            to += steps[axis];
            if (++place[axis] < sizes[axis]) break;
            from -= sizes[axis] * strides[axis];
            to -= sizes[axis] * steps[axis];
            place[axis] = 0;
        }
    }
}

void tbn_call_dense(uint64_t *stack, uint64_t inputs, uint64_t outputs) {
    struct call call;
    (void)inputs, (void)outputs;
    begin_plain(&call, 1, stack);
    void *out = make(&call, call.sizes, false);
    if (call.numel) copy_in_order(&call, data(&call, call.input), data(&call, out));
    torch.delete_tensor(call.input);
    stack[0] = (uint64_t)(uintptr_t)out;
}

/* The size of an axis, counted from the end; 1 for one that the input does not have. */
static int64_t axis_size(const struct call *call, int64_t from_end) {
    return call->dims >= from_end ? call->sizes[call->dims - from_end] : 1;
}

/* How far elements of an axis are apart: 0 where one stands for all. */
static size_t axis_stride(const struct call *call, int64_t from_end) {
    return axis_size(call, from_end) > 1 ? (size_t)call->strides[call->dims - from_end] : 0;
}

/* The query, key or value of attention, of neighbouring floats. */
static struct tbn_vectors vectors(struct call *call) {
    if (axis_size(call, 1) > 1 && call->strides[call->dims - 1] != 1) { /* 0: one float stands for all of a vector */
        densify(call);
        if (read_input(call)) fail(call, "tbn_cpu::attention: an input has no memory");
    }
    return (struct tbn_vectors){data(call, call->input), axis_stride(call, 4), axis_stride(call, 3),
                                axis_stride(call, 2)};
}

/* The size of an axis of samples or heads; one of an input stands for all. */
static size_t shared_size(const struct call *calls, int64_t from_end) {
    int64_t found = 1;
    for (int i = 0; i < 3; i++) {
        const int64_t size = axis_size(&calls[i], from_end);
        if (size == 1) continue;
        if (found != 1 && size != found) fail(calls, "tbn_cpu::attention: samples or heads differ");
        found = size;
    }
    return (size_t)found;
}

/* What is added to scores of this many queries and keys. */
static struct tbn_mask mask_of(struct call *call, const struct tbn_attention *job) {
    if (axis_stride(call, 1) > 1) {
        densify(call);
        if (read_input(call)) fail(call, "tbn_cpu::attention: the mask has no memory");
    }
    const size_t wanted[4] = {job->keys, job->queries, job->heads, job->samples};
    bool fits = call->dims <= call->all->dims;
    for (int axis = 0; fits && axis < 4; axis++) {
        const size_t size = (size_t)axis_size(call, axis + 1);
        fits = size == 1 || size == wanted[axis];
    }
    if (!fits) fail(call, "tbn_cpu::attention: the mask does not fit");
    return (struct tbn_mask){data(call, call->input), axis_stride(call, 4), axis_stride(call, 3), axis_stride(call, 2),
                             axis_stride(call, 1)};
}

/*
 * Whether the heads of one query lie beside each other in the result, or the queries of one head do. Like PyTorch's
 * own, it lies as queries do where these, keys and values have the same samples, heads and width;
 * backends/cpu/attention.py has the same rule.
 */
static bool heads_lie_beside(const struct call *calls) {
    const struct call *query = &calls[0], *value = &calls[2];
    if (query->dims != 4 || axis_size(query, 1) != axis_size(value, 1)) return false;
    for (int i = 1; i < 3; i++)
        for (int64_t axis = 3; axis <= 4; axis++)
            if (axis_size(&calls[i], axis) != axis_size(query, axis)) return false;
    return query->strides[1] < query->strides[2];
}

/* Inputs query, key and value, and a mask if there are four; then the scale, and whether the width divides it. */
static void attend(uint64_t *stack, size_t count, bool causal) {
    struct call calls[4];
    const struct call *query = &calls[0], *key = &calls[1], *value = &calls[2];
    const struct tbn_kernels *kernels = tbn_level("avx512");
    kernels = kernels ? kernels : tbn_level("avx2");
    const bool by_width = stack[count + 1] & 1;
    double scale;
    memcpy(&scale, &stack[count], sizeof scale);
    begin_plain(calls, count, stack);
    if (!kernels) fail(calls, "tbn_cpu::attention: this processor has no kernel for it");
    if (query->dims < 3 || query->dims > 4 || query->dims != key->dims || query->dims != value->dims ||
        axis_size(query, 1) != axis_size(key, 1) || axis_size(key, 2) != axis_size(value, 2))
        fail(calls, "tbn_cpu::attention: the shapes of the inputs do not fit");
    const bool beside = heads_lie_beside(calls); /* before a copy takes the place of an input */
    const struct tbn_vectors found[3] = {vectors(&calls[0]), vectors(&calls[1]), vectors(&calls[2])};
    struct tbn_attention job = {
        .samples = shared_size(calls, 4),
        .heads = shared_size(calls, 3),
        .queries = (size_t)axis_size(query, 2),
        .keys = (size_t)axis_size(key, 2),
        .width = (size_t)axis_size(query, 1),
        .value_width = (size_t)axis_size(value, 1),
        .scale = (float)(by_width ? scale / sqrt((double)axis_size(query, 1)) : scale),
        .causal = causal,
    };
    if (count == 4) job.mask = mask_of(&calls[3], &job);
    const int64_t width = axis_size(value, 1), heads = (int64_t)job.heads, queries = axis_size(query, 2);
    const int64_t sizes[4] = {(int64_t)job.samples, heads, queries, width};
    const int64_t step = width > 1 ? width : 1;
    const int64_t row = step * (heads > 1 ? heads : 1), plane = step * (queries > 1 ? queries : 1);
    const int64_t strides[4] = {row * (queries > 1 ? queries : 1), beside ? step : plane, beside ? row : step, 1};
    job.out_sample = (size_t)(row * queries);
    job.out_head = (size_t)(beside ? step : plane);
    job.out_next = (size_t)(beside ? row : step);
    const int64_t skipped = 4 - query->dims;
    void *out = NULL;
    if (torch.empty_strided(query->dims, sizes + skipped, strides + skipped, FLOAT32, CPU, 0, &out))
        fail(calls, "tbn_cpu::attention: no memory for the result");
    if (tbn_attention(kernels, &job, &found[0], &found[1], &found[2], data(calls, out), threads()) != TBN_OK) {
        torch.delete_tensor(out);
        fail(calls, "tbn_cpu::attention: no memory to work in");
    }
    for (size_t i = 0; i < count; i++) torch.delete_tensor(calls[i].input);
    stack[0] = (uint64_t)(uintptr_t)out;
}

void tbn_call_attention(uint64_t *stack, uint64_t inputs, uint64_t outputs) {
    (void)inputs, (void)outputs;
    attend(stack, 3, stack[5] & 1);
}

void tbn_call_masked_attention(uint64_t *stack, uint64_t inputs, uint64_t outputs) {
    (void)inputs, (void)outputs;
    attend(stack, 4, false);
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
