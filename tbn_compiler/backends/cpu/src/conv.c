/*
 * Convolutions of one or two dimensions, by lookups in tables of neighbouring channels.
 *
 * The tables of a position are built once and serve every tap of the kernel and every filter, and nothing is unrolled
 * in memory: a tap only moves the place at which the tables are read. A unit of work is a band of output rows of one
 * sample and one group of channels, with all its column groups where copies have Hadamard signs. In a band, groups of
 * input channels are taken a few at a time, so that the tables that an output row reads stay in the first-level cache.
 */
#include "pool.h"
#include "scratch.h"
#include "tbn_cpu.h"
#include "wide.h"

#include <math.h>
#include <string.h>

/* Tables that an output row reads, and tables of a band: what first- and second-level caches hold along with the rest. */
enum { ROW_BUDGET = 24 * 1024, BAND_BUDGET = 256 * 1024 };

/* Inputs of a group lie in so many elements when tables are built from them. */
enum { PACKED_GROUP = 8 };

/* One call: what its threads share. */
struct call {
    const struct tbn_conv *layer;
    const struct tbn_format *format;
    const float *x;           /* [samples][groups * channels * mixes][height][width] */
    const int16_t *integers;  /* the same, quantised, or NULL */
    const float *scales;      /* of the samples, where quantised */
    const float *alpha, *bias;
    float *out;
    size_t height, width, out_height, out_width;
    size_t row_size;          /* positions of a padded row: columns of equal phase x mod stride lie together */
    size_t phase_size;        /* positions of a phase */
    size_t taps;
    size_t channel_groups;    /* groups of channels that share a table */
    size_t words;             /* words of a filter in the prepared tile */
    size_t block_words;       /* words looked up in one go */
    size_t block_groups;      /* the most channel groups that they touch */
    size_t bands, band_rows;  /* of output rows */
    size_t filters;           /* computed, rounded up to whole row blocks */
    size_t units;
    tbn_counter next;
};

/* Buffers of one thread. */
struct buffers {
    void *packed; /* inputs of one channel group, [position][PACKED_GROUP] */
    char *tables; /* [channel group][position] */
    void *z;      /* [column group][output position][filter] */
    float *plane; /* one filter's sums, [output position] */
    float *field; /* inputs of one output position, [column group][channel group][tap][channel] */
    uint32_t *offsets;
};

static size_t band_positions(const struct call *call) {
    const struct tbn_conv *layer = call->layer;
    const size_t rows = (call->band_rows - 1) * layer->stride[0] + (layer->kernel[0] - 1) * layer->dilation[0] + 1;
    return rows * call->row_size;
}

/* Inputs of an output from one column group, filled up to whole groups of channels. */
static size_t field_size(const struct call *call) {
    return call->channel_groups * call->taps * call->format->group;
}

static size_t take_buffers(const struct call *call, char *base, struct buffers *buffers) {
    struct tbn_scratch scratch = {base, 0};
    const size_t positions = band_positions(call), outputs = call->band_rows * call->out_width;
    buffers->packed = tbn_take(&scratch, positions * PACKED_GROUP * sizeof(float));
    buffers->tables = tbn_take(&scratch, call->block_groups * positions * call->format->table_bytes);
    buffers->z = tbn_take(&scratch, call->layer->mixes * outputs * call->filters * sizeof(float));
    buffers->plane = tbn_take(&scratch, outputs * sizeof(float));
    buffers->field = tbn_take(&scratch, call->layer->mixes * field_size(call) * sizeof(float));
    buffers->offsets = tbn_take(&scratch, call->block_words * call->format->groups * sizeof(uint32_t));
    return scratch.used;
}

/* Where column `x` of a padded row lies. */
static size_t column_position(const struct call *call, size_t x) {
    const size_t stride = call->layer->stride[1];
    return x % stride * call->phase_size + x / stride;
}

/* Brings the rows of one channel that a band reads between the others of its group. `first` is a padded row. */
static void pack_channel(const struct call *call, size_t plane, size_t first, size_t rows, size_t i, void *packed) {
    const struct tbn_conv *layer = call->layer;
    for (size_t row = 0; row < rows; row++) {
        const size_t y = first + row - layer->padding[0]; /* wraps to a large number above the image */
        if (y >= call->height)
            continue;
        const size_t source = (plane * call->height + y) * call->width;
        for (size_t x = 0; x < call->width; x++) {
            const size_t position = row * call->row_size + column_position(call, x + layer->padding[1]);
            if (call->integers)
                ((int16_t *)packed)[position * PACKED_GROUP + i] = call->integers[source + x];
            else
                ((float *)packed)[position * PACKED_GROUP + i] = call->x[source + x];
        }
    }
}

/* The input channel that is `channel` of column group `mix` of a group. */
static size_t input_channel(const struct call *call, size_t sample, size_t group, size_t mix, size_t channel) {
    const struct tbn_conv *layer = call->layer;
    return ((sample * layer->groups + group) * layer->channels + channel) * layer->mixes + mix;
}

/* Tables of `count` channel groups from `first_group` on, for all positions that a band from padded row `row` reads. */
static void build_tables(const struct call *call, const struct buffers *buffers, size_t sample, size_t group,
                         size_t mix, size_t row, size_t first_group, size_t count) {
    const struct tbn_conv *layer = call->layer;
    const struct tbn_format *format = call->format;
    const size_t positions = band_positions(call);
    for (size_t k = 0; k < count; k++) {
        memset(buffers->packed, 0, positions * PACKED_GROUP * sizeof(float));
        for (size_t i = 0; i < format->group; i++) {
            const size_t channel = (first_group + k) * format->group + i;
            if (channel < layer->channels)
                pack_channel(call, input_channel(call, sample, group, mix, channel), row, positions / call->row_size,
                             i, buffers->packed);
        }
        char *tables = buffers->tables + k * positions * format->table_bytes;
        if (call->integers)
            layer->kernels->tables_i16(buffers->packed, PACKED_GROUP, positions, tables, format->table_bytes);
        else
            layer->kernels->tables_f32(buffers->packed, PACKED_GROUP, positions, tables, format->table_bytes);
    }
}

/*
 * Byte offsets of the tables that words [first, first + words) look up, from the first output of a row. Groups that
 * fill up the last word belong to channel groups past the last one, whose inputs are zeros.
 */
static void find_offsets(const struct call *call, const struct buffers *buffers, size_t first, size_t words) {
    const struct tbn_conv *layer = call->layer;
    const size_t groups = call->format->groups, first_group = first * groups / call->taps;
    for (size_t k = 0; k < words * groups; k++) {
        const size_t index = first * groups + k, tap = index % call->taps;
        const size_t position = (index / call->taps - first_group) * band_positions(call) +
                                tap / layer->kernel[1] * layer->dilation[0] * call->row_size +
                                column_position(call, tap % layer->kernel[1] * layer->dilation[1]);
        buffers->offsets[k] = (uint32_t)(position * call->format->table_bytes);
    }
}

/* Sums of all filters of column group `mix` of a group in a band of `rows` output rows. */
static void lookup_band(const struct call *call, const struct buffers *buffers, size_t sample, size_t group,
                        size_t mix, size_t first_row, size_t rows) {
    const struct tbn_conv *layer = call->layer;
    const struct tbn_format *format = call->format;
    const size_t word_bytes = format->rows * format->word_bytes;
    struct tbn_lookup job = {
        .index_stride = call->words * word_bytes,
        .row_blocks = call->filters / format->rows,
        .offsets = buffers->offsets,
        .lanes = call->out_width,
        .z_stride = call->filters,
    };
    const char *index =
        (const char *)layer->index + (group * layer->mixes + mix) * job.row_blocks * job.index_stride;
    float *z = (float *)buffers->z + mix * rows * call->out_width * call->filters;
    for (size_t word = 0; word < call->words; word += job.words) {
        job.words = tbn_min(call->block_words, call->words - word);
        const size_t first_group = word * format->groups / call->taps;
        const size_t last_group = ((word + job.words) * format->groups - 1) / call->taps;
        build_tables(call, buffers, sample, group, mix, first_row * layer->stride[0], first_group,
                     last_group - first_group + 1);
        find_offsets(call, buffers, word, job.words);
        job.index = index + word * word_bytes;
        job.accumulate = word > 0;
        for (size_t row = 0; row < rows; row++) {
            job.tables = buffers->tables + row * layer->stride[0] * call->row_size * format->table_bytes;
            job.z = z + row * call->out_width * call->filters;
            if (call->integers)
                layer->kernels->lookup_i16(&job);
            else
                layer->kernels->lookup_f32(&job);
        }
    }
}

/* Writes the channels of a group from the sums of its filters, those of each copy where copies have Hadamard signs. */
static void finish_band(const struct call *call, const struct buffers *buffers, size_t sample, size_t group,
                        size_t first_row, size_t rows) {
    const struct tbn_conv *layer = call->layer;
    const size_t outputs = rows * call->out_width, plane_size = call->out_height * call->out_width;
    const size_t sums = layer->mixes * layer->rows; /* channel j of the group has sum j mod `sums` */
    const float scale = call->integers ? call->scales[sample] : 1.0f;
    for (size_t sum = 0; sum < sums; sum++) {
        const size_t begin = sum / layer->rows * outputs * call->filters + sum % layer->rows;
        const float *floats = (const float *)buffers->z + begin;
        const int32_t *integers = (const int32_t *)buffers->z + begin;
        for (size_t i = 0; i < outputs; i++)
            buffers->plane[i] = call->integers ? (float)integers[i * call->filters] : floats[i * call->filters];
        for (size_t j = sum; j < layer->channels_out; j += sums) {
            const size_t channel = group * layer->channels_out + j;
            float *out = call->out + (sample * layer->groups * layer->channels_out + channel) * plane_size +
                         first_row * call->out_width;
            layer->kernels->finish_plane(buffers->plane, outputs, call->alpha[channel / layer->alpha_rows], scale,
                                         call->bias ? call->bias + channel : NULL, layer->relu, out);
        }
    }
}

/* The inputs of one output position from one column group, in the order of a filter's weights. */
static void gather_field(const struct call *call, size_t sample, size_t group, size_t mix, size_t out_y, size_t out_x,
                         float *field) {
    const struct tbn_conv *layer = call->layer;
    memset(field, 0, field_size(call) * sizeof *field);
    for (size_t channel = 0; channel < layer->channels; channel++) {
        const float *plane = call->x + input_channel(call, sample, group, mix, channel) * call->height * call->width;
        const size_t channel_group = channel / call->format->group, i = channel % call->format->group;
        for (size_t tap = 0; tap < call->taps; tap++) {
            /* Both wrap to large numbers above and on the left of the image. */
            const size_t y = out_y * layer->stride[0] + tap / layer->kernel[1] * layer->dilation[0] - layer->padding[0];
            const size_t x = out_x * layer->stride[1] + tap % layer->kernel[1] * layer->dilation[1] - layer->padding[1];
            if (y < call->height && x < call->width)
                field[(channel_group * call->taps + tap) * call->format->group + i] = plane[y * call->width + x];
        }
    }
}

/* The sums of a block of filters of a group in copy `copy`, from the inputs of one output position. */
static void wide_sums(const struct call *call, const float *field, size_t group, size_t block, size_t copy,
                      double *sums) {
    const struct tbn_conv *layer = call->layer;
    const size_t block_rows = call->format->rows, size = field_size(call), tile = call->filters * call->words;
    const uint32_t *index =
        (const uint32_t *)layer->index + group * layer->mixes * tile + block * call->words * block_rows;
    tbn_wide_sums(call->format, index, field, size, sums);
    for (size_t mix = 1; mix < layer->mixes; mix++) {
        double more[TBN_MAX_FLOAT_ROWS];
        tbn_wide_sums(call->format, index + mix * tile, field + mix * size, size, more);
        const double sign = tbn_hadamard(copy, mix) ? -1.0 : 1.0;
        for (size_t row = 0; row < block_rows; row++)
            sums[row] += sign * more[row];
    }
}

/* Computes those outputs of a band again whose sums overflowed on the way; see wide.h. */
static void finish_wide(const struct call *call, const struct buffers *buffers, size_t sample, size_t group,
                        size_t first_row, size_t rows) {
    const struct tbn_conv *layer = call->layer;
    const size_t block_rows = call->format->rows, plane_size = call->out_height * call->out_width;
    const size_t outputs = rows * call->out_width, sums = layer->mixes * layer->rows;
    double block_sums[TBN_MAX_FLOAT_ROWS];
    for (size_t i = 0; i < outputs; i++) {
        const float *z = (const float *)buffers->z + i * call->filters;
        int finite = 1;
        for (size_t mix = 0; mix < layer->mixes; mix++)
            finite &= layer->kernels->all_finite(z + mix * outputs * call->filters, layer->rows);
        if (finite)
            continue;
        for (size_t mix = 0; mix < layer->mixes; mix++)
            gather_field(call, sample, group, mix, first_row + i / call->out_width, i % call->out_width,
                         buffers->field + mix * field_size(call));
        if (!tbn_can_overflow(buffers->field, layer->mixes * field_size(call)))
            continue;
        float *out = call->out + sample * layer->groups * layer->channels_out * plane_size +
                     first_row * call->out_width + i; /* of channel 0 */
        size_t computed = SIZE_MAX; /* the row block, of a copy, whose sums these are */
        for (size_t sum = 0; sum < sums; sum++) {
            const size_t copy = sum / layer->rows, filter = sum % layer->rows;
            if (isfinite(z[copy * outputs * call->filters + filter]))
                continue;
            const size_t block = filter / block_rows, blocks = call->filters / block_rows;
            if (copy * blocks + block != computed)
                wide_sums(call, buffers->field, group, block, copy, block_sums);
            computed = copy * blocks + block;
            for (size_t j = sum; j < layer->channels_out; j += sums) {
                const size_t channel = group * layer->channels_out + j;
                out[channel * plane_size] =
                    tbn_wide_finish(block_sums[filter % block_rows], call->alpha[channel / layer->alpha_rows],
                                    call->bias ? call->bias + channel : NULL, layer->relu);
            }
        }
    }
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
        const size_t band = unit % call->bands, group = unit / call->bands % call->layer->groups;
        const size_t sample = unit / call->bands / call->layer->groups;
        const size_t first_row = band * call->band_rows;
        const size_t rows = tbn_min(call->band_rows, call->out_height - first_row);
        const size_t mixes = call->layer->mixes, sums = rows * call->out_width * call->filters;
        for (size_t mix = 0; mix < mixes; mix++)
            lookup_band(call, &buffers, sample, group, mix, first_row, rows);
        if (call->integers)
            call->layer->kernels->mix_i32(buffers.z, mixes, sums);
        else
            call->layer->kernels->mix_f32(buffers.z, mixes, sums);
        finish_band(call, &buffers, sample, group, first_row, rows);
        if (!call->integers && !call->layer->kernels->all_finite(buffers.z, mixes * sums))
            finish_wide(call, &buffers, sample, group, first_row, rows);
    }
    tbn_free(memory);
}

/* How much is looked up in one go, and how many rows a band has. */
static void plan(struct call *call, size_t samples, size_t threads) {
    const struct tbn_conv *layer = call->layer;
    const struct tbn_format *format = call->format;
    const size_t row_tables = call->row_size * format->table_bytes;
    const size_t rows_read = (layer->kernel[0] - 1) * layer->dilation[0] + 1;
    const size_t groups = tbn_max(1, ROW_BUDGET / (rows_read * row_tables));
    call->block_words = tbn_max(1, groups * call->taps / format->groups);
    if (call->integers)
        call->block_words = tbn_min(call->block_words, TBN_MAX_INT16_INPUTS / (format->groups * format->group));
    call->block_words = tbn_min(call->block_words, call->words);
    /* A block may begin and end within the taps of a channel group. */
    call->block_groups = tbn_ceil_divide(call->block_words * format->groups - 1, call->taps) + 1;
    const size_t rows_held = BAND_BUDGET / (call->block_groups * row_tables);
    call->band_rows = rows_held > rows_read ? (rows_held - rows_read) / layer->stride[0] + 1 : 1;
    call->band_rows = tbn_min(call->band_rows, call->out_height);
    const size_t bands = tbn_ceil_divide(threads, samples * layer->groups); /* enough for every thread */
    call->band_rows = tbn_min(call->band_rows, tbn_ceil_divide(call->out_height, bands));
    call->bands = tbn_ceil_divide(call->out_height, call->band_rows);
    call->units = samples * layer->groups * call->bands;
}

/* Quantises the samples, with one scale for all unless it is NULL; returns the memory that holds integers and scales, or NULL. */
static void *quantize(struct call *call, size_t samples, const float *scale) {
    const struct tbn_conv *layer = call->layer;
    const size_t size = layer->groups * layer->channels * layer->mixes * call->height * call->width;
    const size_t bytes = tbn_round_up(samples * size * sizeof(int16_t), TBN_ALIGN);
    char *memory = tbn_allocate(bytes + samples * sizeof(float));
    if (!memory)
        return NULL;
    int16_t *integers = (int16_t *)(void *)memory;
    float *scales = (float *)(void *)(memory + bytes);
    for (size_t sample = 0; sample < samples; sample++)
        scales[sample] = layer->kernels->quantize(call->x + sample * size, size, layer->activation == TBN_BINARY, scale,
                                                  integers + sample * size);
    call->integers = integers;
    call->scales = scales;
    return memory;
}

int tbn_conv(const struct tbn_conv *layer, const float *x, float *out, size_t samples, size_t height, size_t width,
             const float *alpha, const float *bias, const float *scale, size_t threads) {
    const int integer = layer->activation != TBN_FLOAT;
    const struct tbn_format *format = integer ? &layer->kernels->i16 : &layer->kernels->f32;
    struct call call = {
        .layer = layer,
        .format = format,
        .x = x,
        .alpha = alpha,
        .bias = bias,
        .out = out,
        .height = height,
        .width = width,
        .out_height = tbn_output_size(layer, 0, height),
        .out_width = tbn_output_size(layer, 1, width),
        .phase_size = tbn_ceil_divide(width + 2 * layer->padding[1], layer->stride[1]),
        .taps = layer->kernel[0] * layer->kernel[1],
        .channel_groups = tbn_ceil_divide(layer->channels, format->group),
        .filters = tbn_round_up(layer->rows, format->rows),
    };
    if (samples == 0)
        return TBN_OK;
    call.row_size = call.phase_size * layer->stride[1];
    call.words = tbn_ceil_divide(call.channel_groups * call.taps, format->groups);
    void *quantized = NULL;
    if (integer && !(quantized = quantize(&call, samples, scale)))
        return TBN_OUT_OF_MEMORY;
    plan(&call, samples, threads);
    tbn_parallel(tbn_min(threads, call.units), run, &call);
    tbn_free(quantized);
    return tbn_taken(&call.next) < call.units ? TBN_OUT_OF_MEMORY : TBN_OK;
}
