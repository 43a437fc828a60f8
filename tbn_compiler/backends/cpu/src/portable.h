/*
 * Kernels that every machine has. NEON shares them: it looks up bytes, so that a vector of floats gains nothing, and the
 * compiler turns the rest into its instructions.
 */
#ifndef TBN_PORTABLE_H
#define TBN_PORTABLE_H

#include "generic.h"

#define TARGET
#define INLINE TBN_INLINE

#if defined(TBN_GNU_C)
#define REGISTER_KEEP(value) __asm__("" : "+r"(value))
#define TBN_UNROLL16 _Pragma("GCC unroll 16")
#else
#define REGISTER_KEEP(value) (void)(value)
#define TBN_UNROLL16
#endif
#define ROWS_OF_SIXES 160

enum { ROWS = 16, GROUP = 4, ENTRIES = 1 << GROUP };

static void tables_f32(const float *x, size_t stride, size_t count, void *tables, size_t table_stride) {
    for (size_t k = 0; k < count; k++, x += stride) {
        float *table = (float *)(void *)((char *)tables + k * table_stride);
        for (unsigned entry = 0; entry < ENTRIES; entry++) {
            float sum = 0.0f;
            for (unsigned i = 0; i < GROUP; i++)
                sum += entry >> i & 1 ? x[i] : -x[i];
            table[entry] = sum;
        }
    }
}

static void lookup_f32(const struct tbn_lookup *job) {
    enum { GROUPS = 8 };
    for (size_t block = 0; block < job->row_blocks; block++)
        for (size_t lane = 0; lane < job->lanes; lane++) {
            const char *tables = (const char *)job->tables + lane * ENTRIES * sizeof(float);
            const uint32_t *words = (const uint32_t *)(const void *)((const char *)job->index + block * job->index_stride);
            float *z = (float *)job->z + lane * job->z_stride + block * ROWS;
            float sum[ROWS] = {0};
            if (job->accumulate)
                memcpy(sum, z, sizeof sum);
            for (size_t word = 0; word < job->words; word++, words += ROWS)
                for (unsigned k = 0; k < GROUPS; k++) {
                    const float *table = (const float *)(const void *)(tables + job->offsets[word * GROUPS + k]);
                    for (size_t row = 0; row < ROWS; row++)
                        sum[row] += table[words[row] >> (GROUP * k) & (ENTRIES - 1)];
                }
            memcpy(z, sum, sizeof sum);
        }
}

/* Vectors of 16 bytes: every machine with vectors has these, and the compiler takes them apart on the others. */
#if defined(TBN_GNU_C)
typedef float part __attribute__((vector_size(16)));
enum { PARTS = TBN_BATCH / 4 };
#else
typedef float part;
enum { PARTS = TBN_BATCH };
#endif

typedef struct {
    part parts[PARTS];
} batch;

INLINE batch batch_zero(void) {
    batch value;
    memset(&value, 0, sizeof value);
    return value;
}

INLINE batch batch_load(const float *x) {
    batch value;
    memcpy(&value, x, sizeof value);
    return value;
}

INLINE void batch_store(float *x, batch value) {
    memcpy(x, &value, sizeof value);
}

INLINE batch batch_add(batch a, batch b) {
    for (int i = 0; i < PARTS; i++)
        a.parts[i] += b.parts[i];
    return a;
}

INLINE batch batch_subtract(batch a, batch b) {
    for (int i = 0; i < PARTS; i++)
        a.parts[i] -= b.parts[i];
    return a;
}

INLINE batch batch_add_at(batch sum, const char *from, size_t apart) {
    return batch_add(sum, batch_load((const float *)(const void *)(from + apart)));
}

INLINE batch batch_keep(batch value) {
    return value;
}

INLINE void transpose_block(const float *in, size_t in_stride, float *out, size_t out_stride) {
    for (size_t row = 0; row < TBN_BATCH; row++)
        for (size_t column = 0; column < TBN_BATCH; column++)
            out[column * out_stride + row] = in[row * in_stride + column];
}

#include "sums.h"

static void mix_f32(float *z, size_t mixes, size_t count) {
    mix_floats(z, mixes, count);
}

static void mix_i32(int32_t *z, size_t mixes, size_t count) {
    mix_integers(z, mixes, count);
}

static void finish_f32(const struct tbn_finish *job, const float *z, size_t first, size_t last, float *out) {
    finish_rows(job, z, NULL, 1.0f, first, last, out);
}

static void finish_i32(const struct tbn_finish *job, const int32_t *z, float scale, size_t first, size_t last,
                       float *out) {
    finish_rows(job, NULL, z, scale, first, last, out);
}

static void finish_plane(const float *z, size_t count, float alpha, float scale, const float *bias, int relu,
                         float *out) {
    finish_channel(z, count, alpha, scale, bias, relu, out);
}

static int all_finite(const float *z, size_t count) {
    return are_finite(z, count);
}

static float quantize(const float *x, size_t count, int binary, const float *fixed, int16_t *q) {
    return quantize_token(x, count, binary, fixed, q);
}

#endif
