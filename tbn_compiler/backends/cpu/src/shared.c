/*
 * Convolutions whose tables are made once for each pixel (struct tbn_dot_sharing).
 *
 * Tables of sums take as long to make as dozens of rows to look up, and every place of a kernel meets a pixel again. Results are
 * divided into blocks of equal size, of all samples: a lane stands for a block, and the tables of a pixel hold the pixels that
 * lie at the same distance from where each block begins. They serve all places of the kernel, whose sums belong to different
 * positions of the blocks. Rows of positions are finished as soon as their last pixel was met, so that a few of them are kept.
 *
 * The pixels of a kernel come in the order of its steps: sums are those of bands (dots.c), bit for bit.
 */
#include <string.h>

#include "dots.h"

/* Rows that could be looked up while the tables of a step are made, counted for AVX2; and what a row takes whose sums are not in
   the first-level cache, in percent of another, with a margin for what is not counted. */
enum { TABLE_ROWS = 40, FAR_SUMS = 120 };

/* What the sums of a thread may take: of the second-level cache, along with the rest. */
enum { SUMS_BUDGET = 256 * 1024 };

/* A place of the kernel that meets a pixel for a position, along one axis. */
struct hit {
    size_t place, position;
};

/* Hits of the pixels of a block along one axis, one pixel behind the other; the first of each pixel, and the end. */
struct hits {
    struct hit *hits;
    size_t *first;
};

/* Buffers of one thread. */
struct buffers {
    const uint8_t **lanes, **inputs; /* where the pixels of each block begin, and one of them */
    struct hits hits[2];
    struct tbn_dot_visit *visits;
    char *tables;
    char *sums; /* [column group][row of positions][position], each as struct tbn_dot_sharing has them */
    int32_t *z; /* [column group][position][lane][row] */
};

static size_t rows_of(const struct call *call) {
    return call->blocks * TBN_DOT_ROWS;
}

/* Pixels that `size` positions meet, along one axis. */
static size_t met(const struct tbn_conv *layer, int axis, size_t size) {
    return (size - 1) * layer->stride[axis] + tbn_reach(layer, axis) + 1;
}

/* Rows of positions that a row of pixels belongs to, or that come before the last of these is finished. */
static size_t kept_rows(const struct call *call, size_t height) {
    return tbn_min(height, tbn_reach(call->conv, 0) / call->conv->stride[0] + 1);
}

/* Sums of a position in all lanes. */
static size_t position_bytes(const struct call *call) {
    return tbn_round_up(rows_of(call) * call->sharing->sum_bytes, TBN_ALIGN);
}

static size_t kept_bytes(const struct call *call, const size_t *block) {
    return call->mixes * kept_rows(call, block[0]) * block[1] * position_bytes(call);
}

static size_t take_buffers(const struct call *call, char *base, struct buffers *buffers) {
    struct tbn_scratch scratch = {base, 0};
    const size_t places = call->conv->kernel[0] * call->conv->kernel[1], lanes = call->sharing->lanes;
    buffers->lanes = tbn_take(&scratch, lanes * sizeof *buffers->lanes);
    buffers->inputs = tbn_take(&scratch, lanes * sizeof *buffers->inputs);
    for (int axis = 0; axis < 2; axis++) {
        const size_t hits = call->conv->kernel[axis] * call->block[axis];
        buffers->hits[axis].hits = tbn_take(&scratch, hits * sizeof(struct hit));
        buffers->hits[axis].first = tbn_take(&scratch, (met(call->conv, axis, call->block[axis]) + 1) * sizeof(size_t));
    }
    buffers->visits = tbn_take(&scratch, places * sizeof *buffers->visits);
    buffers->tables = tbn_take(&scratch, call->sharing->table_bytes);
    buffers->sums = tbn_take(&scratch, kept_bytes(call, call->block));
    buffers->z = tbn_take(&scratch, call->mixes * call->block[1] * lanes * rows_of(call) * sizeof(int32_t));
    return scratch.used;
}

size_t tbn_sharing_room(const struct call *call) {
    struct buffers buffers;
    return take_buffers(call, NULL, &buffers);
}

/* The next smaller size of blocks that divides `whole` evenly, but for the last one; 0 where there is none. */
static size_t smaller(size_t whole, size_t size) {
    return size == 1 ? 0 : tbn_ceil_divide(whole, tbn_ceil_divide(whole, size - 1));
}

/* Units of blocks of one size. */
static size_t units_of(const struct call *call, const size_t *block) {
    const size_t blocks =
        call->samples * tbn_ceil_divide(call->out_height, block[0]) * tbn_ceil_divide(call->out_width, block[1]);
    return call->groups * tbn_ceil_divide(blocks, call->sharing->lanes);
}

/* What a step of one thread takes, as rows that are looked up: of blocks, and of bands. */
static size_t cost_of_blocks(const struct call *call, const size_t *block, size_t threads) {
    const struct tbn_conv *layer = call->conv;
    const size_t tables = met(layer, 0, block[0]) * met(layer, 1, block[1]) * TABLE_ROWS;
    const size_t visits = block[0] * block[1] * layer->kernel[0] * layer->kernel[1];
    return tbn_ceil_divide(units_of(call, block), threads) * (tables + visits * rows_of(call) * FAR_SUMS / 100);
}

static size_t cost_of_bands(const struct call *call, size_t threads) {
    const size_t places = call->conv->kernel[0] * call->conv->kernel[1];
    const size_t tiles = tbn_ceil_divide(call->band_rows * call->out_width, call->sharing->lanes);
    return tbn_ceil_divide(call->units, threads) * tiles * places * (TABLE_ROWS + rows_of(call));
}

void tbn_plan_sharing(struct call *call, size_t threads) {
    const struct tbn_conv *layer = call->conv;
    const size_t values = call->pixel_bytes / call->value_bytes;
    const struct tbn_dot_sharing *sharing = tbn_takes_floats(call) ? call->dots->sharing_floats : call->dots->sharing;
    if (!sharing || layer->folded || call->limbs > 1 || values % TBN_DOT_BYTES || layer->kernel[0] * layer->kernel[1] == 1)
        return;
    call->sharing = sharing;
    size_t best = cost_of_bands(call, threads), found[2] = {0, 0}, block[2];
    for (block[0] = call->out_height; block[0]; block[0] = smaller(call->out_height, block[0]))
        for (block[1] = call->out_width; block[1]; block[1] = smaller(call->out_width, block[1])) {
            const size_t cost = cost_of_blocks(call, block, threads);
            if (cost < best && kept_bytes(call, block) <= SUMS_BUDGET) {
                best = cost;
                found[0] = block[0];
                found[1] = block[1];
            }
        }
    if (!found[0]) {
        call->sharing = NULL;
        return;
    }
    call->units = units_of(call, found);
    const size_t whole[2] = {call->out_height, call->out_width};
    for (int axis = 0; axis < 2; axis++) {
        call->block[axis] = found[axis];
        call->block_count[axis] = tbn_ceil_divide(whole[axis], found[axis]);
    }
}

/* A block of one sample: where its positions begin. The last one of a row or column begins earlier than its place says where it
   would not fit, and meets positions of the one before; `skipped` are these. */
struct block {
    size_t sample, start[2], skipped[2];
};

static struct block find_block(const struct call *call, size_t number) {
    const size_t whole[2] = {call->out_height, call->out_width};
    const size_t place[2] = {number / call->block_count[1] % call->block_count[0], number % call->block_count[1]};
    struct block block = {.sample = number / call->block_count[1] / call->block_count[0]};
    for (int axis = 0; axis < 2; axis++) {
        const size_t wanted = place[axis] * call->block[axis];
        block.start[axis] = tbn_min(wanted, whole[axis] - call->block[axis]);
        block.skipped[axis] = wanted - block.start[axis];
    }
    return block;
}

static void find_hits(const struct call *call, int axis, const struct hits *found) {
    const struct tbn_conv *layer = call->conv;
    const size_t pixels = met(layer, axis, call->block[axis]);
    size_t *const first = found->first, begin = 0;
    memset(first, 0, (pixels + 1) * sizeof *first);
    for (size_t position = 0; position < call->block[axis]; position++)
        for (size_t place = 0; place < layer->kernel[axis]; place++)
            first[position * layer->stride[axis] + place * layer->dilation[axis]]++;
    for (size_t pixel = 0; pixel <= pixels; pixel++) { /* from the number of a pixel's hits to where they end */
        begin += first[pixel];
        first[pixel] = begin;
    }
    for (size_t position = call->block[axis]; position-- > 0;)
        for (size_t place = 0; place < layer->kernel[axis]; place++) {
            const size_t pixel = position * layer->stride[axis] + place * layer->dilation[axis];
            found->hits[--first[pixel]] = (struct hit){place, position};
        }
}

/* The places of the kernel that meet the pixel (y, x) of a block, with the sums of its column group. */
static size_t find_visits(const struct call *call, const struct buffers *buffers, size_t y, size_t x, size_t runs, char *sums) {
    const size_t kept = kept_rows(call, call->block[0]), bytes = position_bytes(call);
    const struct hits *rows = &buffers->hits[0], *columns = &buffers->hits[1];
    size_t count = 0;
    for (size_t i = rows->first[y]; i < rows->first[y + 1]; i++) {
        const struct hit *row = &rows->hits[i];
        char *of_row = sums + row->position % kept * call->block[1] * bytes;
        for (size_t j = columns->first[x]; j < columns->first[x + 1]; j++) {
            const struct hit *column = &columns->hits[j];
            buffers->visits[count].step = (row->place * call->conv->kernel[1] + column->place) * runs;
            buffers->visits[count++].sums = of_row + column->position * bytes;
        }
    }
    return count;
}

/* Finishes a row of positions in the blocks from `first` on. */
static void finish_row(const struct call *call, const struct buffers *buffers, size_t first, size_t lanes, size_t group,
                       size_t row) {
    const size_t rows = rows_of(call), bytes = position_bytes(call), kept = kept_rows(call, call->block[0]);
    const size_t z_position = call->sharing->lanes * rows, z_mix = call->block[1] * z_position;
    for (size_t mix = 0; mix < call->mixes; mix++)
        for (size_t x = 0; x < call->block[1]; x++)
            call->sharing->take(buffers->sums + ((mix * kept + row % kept) * call->block[1] + x) * bytes, rows,
                                buffers->z + mix * z_mix + x * z_position);
    tbn_mix(call, buffers->z, z_mix);
    for (size_t lane = 0; lane < lanes; lane++) {
        const struct block block = find_block(call, first + lane);
        if (row < block.skipped[0])
            continue;
        for (size_t x = block.skipped[1]; x < call->block[1]; x += TBN_DOT_INPUTS)
            tbn_finish_positions(call, buffers->z + x * z_position + lane * rows, z_position, z_mix, block.sample, group,
                                 (block.start[0] + row) * call->out_width + block.start[1] + x,
                                 tbn_min(TBN_DOT_INPUTS, call->block[1] - x));
    }
}

void tbn_share(const struct call *call, char *memory, size_t unit) {
    const struct tbn_conv *layer = call->conv;
    const size_t blocks = call->samples * call->block_count[0] * call->block_count[1], all = call->sharing->lanes;
    const size_t sets = tbn_ceil_divide(blocks, all), group = unit / sets, first = unit % sets * all;
    const size_t lanes = tbn_min(all, blocks - first), runs = call->pixel_bytes / call->value_bytes / TBN_DOT_BYTES;
    const size_t kept = kept_rows(call, call->block[0]), sums_mix = kept * call->block[1] * position_bytes(call);
    const size_t index_size = call->blocks * call->steps * TBN_DOT_BYTES / 4; /* of a column group */
    const uint64_t *index = (const uint64_t *)(const void *)layer->index + group * call->mixes * index_size;
    struct buffers buffers;
    take_buffers(call, memory, &buffers);
    for (int axis = 0; axis < 2; axis++)
        find_hits(call, axis, &buffers.hits[axis]);
    for (size_t lane = 0; lane < all; lane++) { /* nobody reads what comes of lanes without a block */
        const struct block block = find_block(call, first + tbn_min(lane, lanes - 1));
        buffers.lanes[lane] = call->bytes + (block.sample * call->groups + group) * call->mixes * call->image_bytes +
                              block.start[0] * layer->stride[0] * call->row_bytes +
                              block.start[1] * layer->stride[1] * call->pixel_bytes;
    }
    struct tbn_dot_pixel job = {.inputs = buffers.inputs, .runs = runs, .visits = buffers.visits, .rows = rows_of(call),
                                .steps = call->steps, .tables = buffers.tables};
    const size_t height = met(layer, 0, call->block[0]), width = met(layer, 1, call->block[1]);
    for (size_t y = 0; y < height; y++) {
        for (size_t x = 0; x < width; x++)
            for (size_t mix = 0; mix < call->mixes; mix++) {
                const size_t at = mix * call->image_bytes + y * call->row_bytes + x * call->pixel_bytes;
                job.count = find_visits(call, &buffers, y, x, runs, buffers.sums + mix * sums_mix);
                if (job.count == 0)
                    continue;
                for (size_t lane = 0; lane < all; lane++)
                    buffers.inputs[lane] = buffers.lanes[lane] + at;
                job.index = index + mix * index_size;
                call->sharing->add(&job);
            }
        const size_t last = tbn_reach(layer, 0);
        if (y >= last && (y - last) % layer->stride[0] == 0)
            finish_row(call, &buffers, first, lanes, group, (y - last) / layer->stride[0]);
    }
}
