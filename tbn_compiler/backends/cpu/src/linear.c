/*
 * Linear layers. Tokens are computed in blocks, and a block on one thread; where there are fewer blocks than threads,
 * threads share a block by rows. Two ways lead to the sums of a block:
 *
 * - lookup: tables in registers, rows across the vector; for a few tokens and for integers.
 * - sums: tables in memory, TBN_BATCH tokens across the vector; faster per token from TBN_MIN_BATCH on.
 *
 * Where copies have Hadamard signs, the inputs of a block are dealt out to their column groups, each group is summed like
 * a layer of its own, and the sums are mixed: those of group j become those of copy j.
 */
#include "pool.h"
#include "scratch.h"
#include "tbn_cpu.h"
#include "wide.h"

#include <math.h>
#include <string.h>

enum { LOOKUP_TOKENS = 4 };

/* Tables stay in the first-level cache (32 KiB or more), along with the index words and sums that stream past. */
enum { TABLE_BUDGET = 16 * 1024 };

/* One call: what its threads share. */
struct call {
    const struct tbn_linear *layer;
    struct tbn_finish finish;
    const float *x;
    const float *scale; /* of all inputs, or NULL */
    float *out;
    size_t columns; /* inputs of a column group */
    size_t tokens;
    size_t sums_tokens;  /* the first tokens, computed by sums */
    size_t sums_blocks, lookup_blocks;
    size_t parts;        /* threads that share a block */
    const struct tbn_format *format;
    size_t words;        /* words of a row in the prepared tile */
    size_t block_words;  /* words whose tables are in the cache at once */
    size_t units;        /* parts of blocks */
    tbn_counter next;    /* the next unit to compute */
};

/* Buffers of one thread. */
struct buffers {
    void *tables;
    void *z;           /* [column group][token][row] */
    float *rows;       /* sums of a batch, [column group][token][row] */
    float *apart;      /* inputs dealt out, [column group][token][columns] */
    int16_t *whole;    /* integers of a token before they are dealt out */
    int16_t *integers; /* [column group][token][padded columns] */
    float *padded;     /* the inputs of the last words, and zeros */
    uint32_t *offsets;
};

static int is_integer(const struct tbn_linear *layer) {
    return layer->activation != TBN_FLOAT;
}

static size_t word_inputs(const struct call *call) {
    return call->format->groups * call->format->group;
}

/* Inputs of a column group, filled up to whole words. */
static size_t padded_columns(const struct call *call) {
    return call->words * word_inputs(call);
}

/* Lays the buffers out; returns the bytes that they take. */
static size_t take_buffers(const struct call *call, char *base, struct buffers *buffers) {
    struct tbn_scratch scratch = {base, 0};
    const struct tbn_linear *layer = call->layer;
    const size_t block_groups = call->block_words * call->format->groups;
    const size_t rows = tbn_round_up(layer->rows, call->format->rows);
    const int mixed = layer->mixes > 1;
    size_t tables = 0, z = 0;
    if (call->lookup_blocks) {
        tables = block_groups * LOOKUP_TOKENS * call->format->table_bytes;
        z = layer->mixes * rows * LOOKUP_TOKENS * sizeof(float);
    }
    if (call->sums_blocks) {
        tables = tbn_max(tables, TBN_SUMS_TABLES_BYTES);
        z = tbn_max(z, layer->rows * TBN_BATCH * sizeof(float));
    }
    buffers->tables = tbn_take(&scratch, tables);
    buffers->z = tbn_take(&scratch, z);
    buffers->rows =
        tbn_take(&scratch, call->sums_blocks ? layer->mixes * layer->rows * TBN_BATCH * sizeof(float) : 0);
    const size_t lanes = call->sums_blocks ? TBN_BATCH : LOOKUP_TOKENS;
    buffers->apart = tbn_take(&scratch, mixed && !is_integer(layer) ? lanes * layer->inputs * sizeof(float) : 0);
    buffers->whole = tbn_take(&scratch, mixed && is_integer(layer) ? layer->inputs * sizeof(int16_t) : 0);
    buffers->integers = tbn_take(
        &scratch, is_integer(layer) ? layer->mixes * LOOKUP_TOKENS * padded_columns(call) * sizeof(int16_t) : 0);
    buffers->padded = tbn_take(&scratch, call->block_words * word_inputs(call) * sizeof(float));
    buffers->offsets = tbn_take(&scratch, block_groups * sizeof(uint32_t));
    return scratch.used;
}

/* Deals the inputs of `lanes` tokens from `token` on out to their column groups. */
static void deal_out(const struct call *call, size_t token, size_t lanes, float *apart) {
    const size_t mixes = call->layer->mixes, columns = call->columns;
    for (size_t lane = 0; lane < lanes; lane++) {
        const float *x = call->x + (token + lane) * call->layer->inputs;
        for (size_t j = 0; j < mixes; j++)
            for (size_t i = 0; i < columns; i++)
                apart[(j * lanes + lane) * columns + i] = x[i * mixes + j];
    }
}

/* Where the inputs of column group `group` of a token lie. */
static const float *inputs_of(const struct call *call, const struct buffers *buffers, size_t token, size_t lane,
                              size_t lanes, size_t group) {
    if (call->layer->mixes == 1)
        return call->x + (token + lane) * call->layer->inputs;
    return buffers->apart + (group * lanes + lane) * call->columns;
}

/* Tables of `words` words from word `first` on of a column group, for `lanes` tokens from `token` on. */
static void build_tables(const struct call *call, const struct buffers *buffers, size_t token, size_t lanes,
                         size_t group, size_t first, size_t words) {
    const struct tbn_linear *layer = call->layer;
    const struct tbn_format *format = call->format;
    const size_t begin = first * word_inputs(call), count = words * word_inputs(call);
    for (size_t lane = 0; lane < lanes; lane++) {
        char *tables = (char *)buffers->tables + lane * format->table_bytes;
        const size_t stride = lanes * format->table_bytes, groups = words * format->groups;
        if (is_integer(layer)) {
            const int16_t *q = buffers->integers + (group * lanes + lane) * padded_columns(call) + begin;
            layer->kernels->tables_i16(q, format->group, groups, tables, stride);
            continue;
        }
        const float *x = inputs_of(call, buffers, token, lane, lanes, group) + begin;
        if (begin + count > call->columns) {
            memset(buffers->padded, 0, count * sizeof(float));
            memcpy(buffers->padded, x, (call->columns - begin) * sizeof(float));
            x = buffers->padded;
        }
        layer->kernels->tables_f32(x, format->group, groups, tables, stride);
    }
}

/*
 * The sums of the rows of a block in copy `copy`, from all inputs of a token: those of its column groups with their signs.
 * Inputs of column group j lie at x + j * stride.
 */
static void wide_sums(const struct call *call, const float *x, size_t stride, size_t block, size_t copy,
                      double *sums) {
    const struct tbn_linear *layer = call->layer;
    const size_t block_rows = call->format->rows;
    const size_t group_words = tbn_ceil_divide(layer->rows, block_rows) * call->words * block_rows;
    const uint32_t *index = (const uint32_t *)layer->index + block * call->words * block_rows;
    tbn_wide_sums(call->format, index, x, call->columns, sums);
    for (size_t j = 1; j < layer->mixes; j++) {
        double group[TBN_MAX_FLOAT_ROWS];
        tbn_wide_sums(call->format, index + j * group_words, x + j * stride, call->columns, group);
        const double sign = tbn_hadamard(copy, j) ? -1.0 : 1.0;
        for (size_t row = 0; row < block_rows; row++)
            sums[row] += sign * group[row];
    }
}

/* Computes those of rows [first, last) of one token in `copies` copies from `copy` on again whose sums `z` overflowed. */
static void finish_wide(const struct call *call, const struct tbn_finish *finish, const float *x, size_t stride,
                        const float *z, size_t copy, size_t first, size_t last, float *out) {
    const struct tbn_linear *layer = call->layer;
    const size_t block_rows = call->format->rows;
    double sums[TBN_MAX_FLOAT_ROWS];
    size_t computed = SIZE_MAX; /* the row block whose sums these are */
    for (size_t row = first; row < last; row++) {
        if (isfinite(z[row - first]))
            continue;
        const size_t block = row / block_rows;
        if (block != computed)
            wide_sums(call, x, stride, block, copy, sums);
        computed = block;
        for (size_t i = 0; i < finish->copies; i++) {
            const size_t output = i * layer->rows + row;
            out[output] = tbn_wide_finish(
                sums[row % block_rows], finish->alpha[i * finish->alpha_copy_stride + row * finish->alpha_row_stride],
                finish->bias ? finish->bias + output : NULL, finish->relu);
        }
    }
}

/* How the outputs of copy `copy` are made, which are all there are of its sums. */
static struct tbn_finish finish_of(const struct call *call, size_t copy) {
    struct tbn_finish finish = call->finish;
    finish.copies = 1;
    finish.alpha += copy * finish.alpha_copy_stride;
    finish.bias = finish.bias ? finish.bias + copy * finish.rows : NULL;
    return finish;
}

/*
 * Outputs of rows [first, last) of one token, from the sums of these rows, those of successive copies `z_stride` apart.
 * Inputs of its column group j lie at x + j * stride.
 */
static void finish_floats(const struct call *call, size_t token, const float *x, size_t stride, const float *z,
                          size_t z_stride, size_t first, size_t last) {
    const struct tbn_linear *layer = call->layer;
    float *out = call->out + token * layer->copies * layer->rows;
    int finite = 1;
    for (size_t copy = 0; copy < layer->mixes; copy++) {
        const struct tbn_finish finish = layer->mixes > 1 ? finish_of(call, copy) : call->finish;
        layer->kernels->finish_f32(&finish, z + copy * z_stride, first, last, out + copy * layer->rows);
        finite &= layer->kernels->all_finite(z + copy * z_stride, last - first);
    }
    if (finite || !tbn_can_overflow(call->x + token * layer->inputs, layer->inputs))
        return;
    for (size_t copy = 0; copy < layer->mixes; copy++) {
        const struct tbn_finish finish = layer->mixes > 1 ? finish_of(call, copy) : call->finish;
        finish_wide(call, &finish, x, stride, z + copy * z_stride, copy, first, last, out + copy * layer->rows);
    }
}

/* The integers of one token, dealt out to its column groups and filled up with zeros; returns their scale. */
static float quantize(const struct call *call, const struct buffers *buffers, size_t token, size_t lane,
                      size_t lanes) {
    const struct tbn_linear *layer = call->layer;
    const size_t mixes = layer->mixes, padded = padded_columns(call);
    const float *x = call->x + (token + lane) * layer->inputs;
    int16_t *integers = buffers->integers + lane * padded;
    int16_t *whole = mixes > 1 ? buffers->whole : integers;
    const float scale = layer->kernels->quantize(x, layer->inputs, layer->activation == TBN_BINARY, call->scale, whole);
    for (size_t j = 0; j < mixes; j++, integers += lanes * padded) {
        for (size_t i = 0; mixes > 1 && i < call->columns; i++)
            integers[i] = whole[i * mixes + j];
        memset(integers + call->columns, 0, (padded - call->columns) * sizeof *integers);
    }
    return scale;
}

/* Row blocks [first, last) of `lanes` tokens. */
static void lookup_part(const struct call *call, const struct buffers *buffers, size_t token, size_t lanes,
                        size_t first, size_t last) {
    const struct tbn_linear *layer = call->layer;
    const struct tbn_format *format = call->format;
    float scale[LOOKUP_TOKENS] = {0};
    if (is_integer(layer))
        for (size_t lane = 0; lane < lanes; lane++)
            scale[lane] = quantize(call, buffers, token, lane, lanes);
    else if (layer->mixes > 1)
        deal_out(call, token, lanes, buffers->apart);
    const size_t groups = call->block_words * format->groups;
    for (size_t k = 0; k < groups; k++)
        buffers->offsets[k] = (uint32_t)(k * lanes * format->table_bytes);
    const size_t word_bytes = format->rows * format->word_bytes;
    const size_t z_stride = (last - first) * format->rows, group_stride = lanes * z_stride;
    const size_t group_bytes = tbn_ceil_divide(layer->rows, format->rows) * call->words * word_bytes;
    struct tbn_lookup job = {
        .index_stride = call->words * word_bytes,
        .row_blocks = last - first,
        .tables = buffers->tables,
        .offsets = buffers->offsets,
        .lanes = lanes,
        .z_stride = z_stride,
    };
    for (size_t group = 0; group < layer->mixes; group++)
        for (size_t word = 0; word < call->words; word += job.words) {
            job.words = tbn_min(call->block_words, call->words - word);
            job.index = (const char *)layer->index + group * group_bytes + first * job.index_stride + word * word_bytes;
            job.accumulate = word > 0;
            job.z = (float *)buffers->z + group * group_stride;
            build_tables(call, buffers, token, lanes, group, word, job.words);
            if (is_integer(layer))
                layer->kernels->lookup_i16(&job);
            else
                layer->kernels->lookup_f32(&job);
        }
    const size_t first_row = first * format->rows, last_row = tbn_min(last * format->rows, layer->rows);
    if (is_integer(layer)) {
        const int32_t *z = buffers->z;
        layer->kernels->mix_i32(buffers->z, layer->mixes, group_stride);
        for (size_t lane = 0; lane < lanes; lane++)
            for (size_t copy = 0; copy < layer->mixes; copy++) {
                const struct tbn_finish finish = layer->mixes > 1 ? finish_of(call, copy) : call->finish;
                float *out = call->out + ((token + lane) * layer->copies + copy) * layer->rows;
                layer->kernels->finish_i32(&finish, z + copy * group_stride + lane * z_stride, scale[lane], first_row,
                                           last_row, out);
            }
        return;
    }
    layer->kernels->mix_f32(buffers->z, layer->mixes, group_stride);
    for (size_t lane = 0; lane < lanes; lane++)
        finish_floats(call, token + lane, inputs_of(call, buffers, token, lane, lanes, 0), lanes * call->columns,
                      (const float *)buffers->z + lane * z_stride, group_stride, first_row, last_row);
}

/* Rows [first, last) of up to TBN_BATCH tokens. */
static void sums_part(const struct call *call, const struct buffers *buffers, size_t token, size_t first, size_t last) {
    const struct tbn_linear *layer = call->layer;
    const size_t tokens = tbn_min(TBN_BATCH, call->sums_tokens - token), rows = last - first;
    const size_t group_stride = tokens * rows;
    const size_t group_words = tbn_ceil_divide(call->columns, TBN_SUMS_INPUTS) * layer->rows;
    if (layer->mixes > 1)
        deal_out(call, token, tokens, buffers->apart);
    for (size_t group = 0; group < layer->mixes; group++) {
        const struct tbn_sums job = {
            .index = (const uint64_t *)layer->sums_index + group * group_words + first,
            .index_stride = layer->rows,
            .layer_rows = layer->rows,
            .rows = rows,
            .inputs = call->columns,
            .x = inputs_of(call, buffers, token, 0, tokens, group),
            .tokens = tokens,
            .tables = buffers->tables,
            .z = buffers->z,
            .out = buffers->rows + group * group_stride,
        };
        layer->kernels->sums(&job);
    }
    layer->kernels->mix_f32(buffers->rows, layer->mixes, group_stride);
    for (size_t i = 0; i < tokens; i++)
        finish_floats(call, token + i, inputs_of(call, buffers, token, i, tokens, 0), tokens * call->columns,
                      buffers->rows + i * rows, group_stride, first, last);
}

/* Part `part` of `parts` of a range: [*first, *last). */
static void share(size_t count, size_t part, size_t parts, size_t *first, size_t *last) {
    *first = count * part / parts;
    *last = count * (part + 1) / parts;
}

static void run(void *argument) {
    struct call *call = argument;
    struct buffers buffers;
    char *memory = tbn_allocate(tbn_max(take_buffers(call, NULL, &buffers), TBN_ALIGN));
    if (!memory)
        return; /* the units are left to the other threads, or remain */
    take_buffers(call, memory, &buffers);
    for (;;) {
        const size_t unit = tbn_take_number(&call->next);
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
    tbn_free(memory);
}

int tbn_linear(const struct tbn_linear *layer, const float *x, float *out, size_t tokens, const float *alpha,
               const float *bias, const float *scale, size_t threads) {
    const struct tbn_format *format = is_integer(layer) ? &layer->kernels->i16 : &layer->kernels->f32;
    struct call call = {
        .layer = layer,
        .finish = {layer->rows, layer->copies, alpha, layer->alpha_copy_stride, layer->alpha_row_stride, bias,
                   layer->relu},
        .x = x,
        .scale = scale,
        .out = out,
        .columns = layer->inputs / layer->mixes,
        .tokens = tokens,
        .format = format,
    };
    call.words = tbn_ceil_divide(call.columns, format->groups * format->group);
    if (layer->sums_index && !is_integer(layer)) {
        const size_t rest = tokens % TBN_BATCH;
        call.sums_tokens = rest < TBN_MIN_BATCH ? tokens - rest : tokens;
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
    return tbn_taken(&call.next) < call.units ? TBN_OUT_OF_MEMORY : TBN_OK;
}
