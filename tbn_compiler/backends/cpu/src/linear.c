/*
 * Linear layers. Tokens are computed in blocks, and a block on one thread; where there are fewer blocks than threads,
 * threads share a block by rows. Two ways lead to the sums of a block:
 *
 * - lookup: tables in registers, rows across the vector; for a few tokens and for integers.
 * - sums: tables in memory, TBN_BATCH tokens across the vector; faster per token from MIN_SUMS_TOKENS on.
 */
#include "pool.h"
#include "scratch.h"
#include "tbn_cpu.h"
#include "wide.h"

#include <math.h>
#include <stdatomic.h>
#include <string.h>

enum { LOOKUP_TOKENS = 4, MIN_SUMS_TOKENS = 12 };

/* Tables stay in the first-level cache (32 KiB or more), along with the index words and sums that stream past. */
enum { TABLE_BUDGET = 16 * 1024 };

/* One call: what its threads share. */
struct call {
    const struct tbn_linear *layer;
    struct tbn_finish finish;
    const float *x;
    float *out;
    size_t tokens;
    size_t sums_tokens;  /* the first tokens, computed by sums */
    size_t sums_blocks, lookup_blocks;
    size_t parts;        /* threads that share a block */
    const struct tbn_format *format;
    size_t words;        /* words of a row in the prepared tile */
    size_t block_words;  /* words whose tables are in the cache at once */
    size_t units;        /* parts of blocks */
    atomic_size_t next;  /* the next unit to compute */
};

/* Buffers of one thread. */
struct buffers {
    void *tables;
    void *z;
    float *rows;       /* sums of a batch, [token][row] */
    int16_t *integers; /* [LOOKUP_TOKENS][padded inputs] */
    float *padded;     /* the inputs of the last words, and zeros */
    uint32_t *offsets;
};

static int is_integer(const struct tbn_linear *layer) {
    return layer->activation != TBN_FLOAT;
}

static size_t word_inputs(const struct call *call) {
    return call->format->groups * call->format->group;
}

/* Lays the buffers out; returns the bytes that they take. */
static size_t take_buffers(const struct call *call, char *base, struct buffers *buffers) {
    struct tbn_scratch scratch = {base, 0};
    const struct tbn_linear *layer = call->layer;
    const size_t block_groups = call->block_words * call->format->groups;
    const size_t rows = tbn_round_up(layer->rows, call->format->rows);
    size_t tables = 0, z = 0;
    if (call->lookup_blocks) {
        tables = block_groups * LOOKUP_TOKENS * call->format->table_bytes;
        z = rows * LOOKUP_TOKENS * sizeof(float);
    }
    if (call->sums_blocks) {
        tables = tbn_max(tables, TBN_SUMS_GROUPS * TBN_SUMS_TABLE_BYTES);
        z = tbn_max(z, layer->rows * TBN_BATCH * sizeof(float));
    }
    buffers->tables = tbn_take(&scratch, tables);
    buffers->z = tbn_take(&scratch, z);
    buffers->rows = tbn_take(&scratch, call->sums_blocks ? layer->rows * TBN_BATCH * sizeof(float) : 0);
    buffers->integers = tbn_take(
        &scratch, is_integer(layer) ? LOOKUP_TOKENS * call->words * word_inputs(call) * sizeof(int16_t) : 0);
    buffers->padded = tbn_take(&scratch, call->block_words * word_inputs(call) * sizeof(float));
    buffers->offsets = tbn_take(&scratch, block_groups * sizeof(uint32_t));
    return scratch.used;
}

/* Tables of `words` words from word `first` on, for `lanes` tokens from `token` on. */
static void build_tables(const struct call *call, const struct buffers *buffers, size_t token, size_t lanes,
                         size_t first, size_t words) {
    const struct tbn_linear *layer = call->layer;
    const struct tbn_format *format = call->format;
    const size_t begin = first * word_inputs(call), count = words * word_inputs(call);
    for (size_t lane = 0; lane < lanes; lane++) {
        char *tables = (char *)buffers->tables + lane * format->table_bytes;
        const size_t stride = lanes * format->table_bytes, groups = words * format->groups;
        if (is_integer(layer)) {
            const int16_t *q = buffers->integers + lane * call->words * word_inputs(call) + begin;
            layer->kernels->tables_i16(q, format->group, groups, tables, stride);
            continue;
        }
        const float *x = call->x + (token + lane) * layer->inputs + begin;
        if (begin + count > layer->inputs) {
            memset(buffers->padded, 0, count * sizeof(float));
            memcpy(buffers->padded, x, (layer->inputs - begin) * sizeof(float));
            x = buffers->padded;
        }
        layer->kernels->tables_f32(x, format->group, groups, tables, stride);
    }
}

/* Computes those of rows [first, last) of one token again whose sums `z` overflowed on the way; see wide.h. */
static void finish_wide(const struct call *call, size_t token, const float *z, size_t first, size_t last, float *out) {
    const struct tbn_linear *layer = call->layer;
    const struct tbn_finish *finish = &call->finish;
    const float *x = call->x + token * layer->inputs;
    if (!tbn_can_overflow(x, layer->inputs))
        return;
    const size_t block_rows = call->format->rows;
    double sums[TBN_MAX_FLOAT_ROWS];
    size_t computed = SIZE_MAX; /* the row block whose sums these are */
    for (size_t row = first; row < last; row++) {
        if (isfinite(z[row - first]))
            continue;
        const size_t block = row / block_rows;
        if (block != computed)
            tbn_wide_sums(call->format, (const uint32_t *)layer->index + block * call->words * block_rows, x,
                          layer->inputs, sums);
        computed = block;
        for (size_t copy = 0; copy < layer->copies; copy++) {
            const size_t output = copy * layer->rows + row;
            out[output] = tbn_wide_finish(
                sums[row % block_rows],
                finish->alpha[copy * finish->alpha_copy_stride + row * finish->alpha_row_stride],
                finish->bias ? finish->bias + output : NULL, finish->relu);
        }
    }
}

/* Outputs of rows [first, last) of one token, from the sums of these rows. */
static void finish_floats(const struct call *call, size_t token, const float *z, size_t first, size_t last) {
    const struct tbn_linear *layer = call->layer;
    float *out = call->out + token * layer->copies * layer->rows;
    layer->kernels->finish_f32(&call->finish, z, first, last, out);
    if (!layer->kernels->all_finite(z, last - first))
        finish_wide(call, token, z, first, last, out);
}

/* Row blocks [first, last) of `lanes` tokens. */
static void lookup_part(const struct call *call, const struct buffers *buffers, size_t token, size_t lanes,
                        size_t first, size_t last) {
    const struct tbn_linear *layer = call->layer;
    const struct tbn_format *format = call->format;
    float scale[LOOKUP_TOKENS] = {0};
    if (is_integer(layer)) {
        const size_t padded = call->words * word_inputs(call);
        for (size_t lane = 0; lane < lanes; lane++) {
            int16_t *q = buffers->integers + lane * padded;
            scale[lane] = layer->kernels->quantize(call->x + (token + lane) * layer->inputs, layer->inputs,
                                                   layer->activation == TBN_BINARY, q);
            memset(q + layer->inputs, 0, (padded - layer->inputs) * sizeof *q);
        }
    }
    const size_t groups = call->block_words * format->groups;
    for (size_t k = 0; k < groups; k++)
        buffers->offsets[k] = (uint32_t)(k * lanes * format->table_bytes);
    const size_t word_bytes = format->rows * format->word_bytes;
    struct tbn_lookup job = {
        .index_stride = call->words * word_bytes,
        .row_blocks = last - first,
        .tables = buffers->tables,
        .offsets = buffers->offsets,
        .lanes = lanes,
        .z = buffers->z,
        .z_stride = (last - first) * format->rows,
    };
    for (size_t word = 0; word < call->words; word += job.words) {
        job.words = tbn_min(call->block_words, call->words - word);
        job.index = (const char *)layer->index + first * job.index_stride + word * word_bytes;
        job.accumulate = word > 0;
        build_tables(call, buffers, token, lanes, word, job.words);
        if (is_integer(layer))
            layer->kernels->lookup_i16(&job);
        else
            layer->kernels->lookup_f32(&job);
    }
    const size_t first_row = first * format->rows, last_row = tbn_min(last * format->rows, layer->rows);
    for (size_t lane = 0; lane < lanes; lane++) {
        if (is_integer(layer))
            layer->kernels->finish_i32(&call->finish, (const int32_t *)buffers->z + lane * job.z_stride, scale[lane],
                                       first_row, last_row,
                                       call->out + (token + lane) * layer->copies * layer->rows);
        else
            finish_floats(call, token + lane, (const float *)buffers->z + lane * job.z_stride, first_row, last_row);
    }
}

/* Rows [first, last) of up to TBN_BATCH tokens. */
static void sums_part(const struct call *call, const struct buffers *buffers, size_t token, size_t first, size_t last) {
    const struct tbn_linear *layer = call->layer;
    static const float zero[TBN_BATCH] __attribute__((aligned(TBN_ALIGN)));
    const struct tbn_sums job = {
        .index = (const uint16_t *)layer->sums_index + first * TBN_SUMS_GROUPS,
        .index_stride = layer->rows * TBN_SUMS_GROUPS,
        .rows = last - first,
        .inputs = layer->inputs,
        .x = call->x + token * layer->inputs,
        .tokens = tbn_min(TBN_BATCH, call->sums_tokens - token),
        .tables = buffers->tables,
        .zero = zero,
        .z = buffers->z,
        .out = buffers->rows,
    };
    layer->kernels->sums(&job);
    for (size_t i = 0; i < job.tokens; i++)
        finish_floats(call, token + i, buffers->rows + i * job.rows, first, last);
}

/* Part `part` of `parts` of a range: [*first, *last). */
static void share(size_t count, size_t part, size_t parts, size_t *first, size_t *last) {
    *first = count * part / parts;
    *last = count * (part + 1) / parts;
}

static void run(void *argument) {
    struct call *call = argument;
    struct buffers buffers;
    char *memory = aligned_alloc(TBN_ALIGN, tbn_max(take_buffers(call, NULL, &buffers), TBN_ALIGN));
    if (!memory)
        return; /* the units are left to the other threads, or remain */
    take_buffers(call, memory, &buffers);
    for (;;) {
        const size_t unit = atomic_fetch_add(&call->next, 1);
        if (unit >= call->units)
            break;
        const size_t block = unit / call->parts, part = unit % call->parts;
        size_t first, last;
        if (block < call->sums_blocks) {
            share(call->layer->rows, part, call->parts, &first, &last);
            if (first < last)
                sums_part(call, &buffers, block * TBN_BATCH, first, last);
        } else {
            const size_t token = call->sums_tokens + (block - call->sums_blocks) * LOOKUP_TOKENS;
            share(tbn_ceil_divide(call->layer->rows, call->format->rows), part, call->parts, &first, &last);
            if (first < last)
                lookup_part(call, &buffers, token, tbn_min(LOOKUP_TOKENS, call->tokens - token), first, last);
        }
    }
    free(memory);
}

int tbn_linear(const struct tbn_linear *layer, const float *x, float *out, size_t tokens, const float *alpha,
               const float *bias, size_t threads) {
    const struct tbn_format *format = is_integer(layer) ? &layer->kernels->i16 : &layer->kernels->f32;
    struct call call = {
        .layer = layer,
        .finish = {layer->rows, layer->copies, alpha, layer->alpha_copy_stride, layer->alpha_row_stride, bias,
                   layer->relu},
        .x = x,
        .out = out,
        .tokens = tokens,
        .format = format,
        .words = tbn_ceil_divide(layer->inputs, format->groups * format->group),
    };
    if (layer->sums_index && !is_integer(layer)) {
        const size_t rest = tokens % TBN_BATCH;
        call.sums_tokens = rest < MIN_SUMS_TOKENS ? tokens - rest : tokens;
    }
    call.sums_blocks = tbn_ceil_divide(call.sums_tokens, TBN_BATCH);
    call.lookup_blocks = tbn_ceil_divide(tokens - call.sums_tokens, LOOKUP_TOKENS);
    const size_t blocks = call.sums_blocks + call.lookup_blocks;
    if (blocks == 0)
        return TBN_OK;
    call.parts = blocks < threads ? tbn_ceil_divide(threads, blocks) : 1;
    const size_t lanes = tbn_min(LOOKUP_TOKENS, tokens);
    call.block_words = tbn_max(1, TABLE_BUDGET / (lanes * format->groups * format->table_bytes));
    if (is_integer(layer))
        call.block_words = tbn_min(call.block_words, TBN_MAX_INT16_INPUTS / (format->groups * format->group));
    call.block_words = tbn_min(call.block_words, call.words);
    call.units = blocks * call.parts;
    tbn_parallel(tbn_min(threads, call.units), run, &call);
    return atomic_load(&call.next) < call.units ? TBN_OUT_OF_MEMORY : TBN_OK;
}
