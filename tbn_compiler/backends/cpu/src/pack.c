/* Tiles in the order in which the kernels read them. */
#include "tbn_cpu.h"

#include <string.h>

static const struct tbn_format *format_of(const struct tbn_kernels *kernels, int integer) {
    return integer ? &kernels->i16 : &kernels->f32;
}

static size_t ceil_divide(size_t a, size_t b) {
    return (a + b - 1) / b;
}

static size_t words_of(const struct tbn_format *format, size_t columns) {
    return ceil_divide(columns, format->groups * format->group);
}

size_t tbn_group(const struct tbn_kernels *kernels, int integer) {
    return format_of(kernels, integer)->group;
}

size_t tbn_pack_bytes(const struct tbn_kernels *kernels, int integer, size_t rows, size_t columns) {
    const struct tbn_format *format = format_of(kernels, integer);
    return ceil_divide(rows, format->rows) * words_of(format, columns) * format->rows * format->word_bytes;
}

/* The entry that `row` looks up for the group that starts at `first`: bit i is the sign of input first + i. */
static uint32_t entry_of(const int8_t *row, size_t first, size_t columns, size_t group) {
    uint32_t entry = 0;
    for (size_t i = 0; i < group && first + i < columns; i++)
        entry |= (uint32_t)(row[first + i] > 0) << i;
    return entry;
}

void tbn_pack(const struct tbn_kernels *kernels, int integer, const int8_t *signs, size_t rows, size_t columns,
              void *index) {
    const struct tbn_format *format = format_of(kernels, integer);
    const size_t words = words_of(format, columns), word_inputs = format->groups * format->group;
    uint8_t *out = index;
    memset(out, 0, tbn_pack_bytes(kernels, integer, rows, columns));
    for (size_t row = 0; row < rows; row++)
        for (size_t word = 0; word < words; word++) {
            uint32_t bits = 0;
            for (size_t k = 0; k < format->groups; k++)
                bits |= entry_of(signs + row * columns, word * word_inputs + k * format->group, columns, format->group)
                        << (k * format->group);
            const size_t lane = (row / format->rows * words + word) * format->rows + row % format->rows;
            /* The kernels run on little-endian machines, or read words of the machine's own order. */
            const uint16_t half = (uint16_t)bits;
            const uint8_t byte = (uint8_t)bits;
            const void *source = format->word_bytes == 4 ? (const void *)&bits
                                 : format->word_bytes == 2 ? (const void *)&half
                                                           : (const void *)&byte;
            memcpy(out + lane * format->word_bytes, source, format->word_bytes);
        }
}

size_t tbn_pack_sums_bytes(size_t rows, size_t columns) {
    return ceil_divide(columns, TBN_SUMS_INPUTS) * rows * sizeof(uint64_t);
}

void tbn_pack_sums(const int8_t *signs, size_t rows, size_t columns, void *index) {
    uint64_t *out = index;
    for (size_t first = 0; first < columns; first += TBN_SUMS_INPUTS)
        for (size_t row = 0; row < rows; row++, out++) {
            *out = 0;
            for (size_t i = 0; i < TBN_SUMS_INPUTS; i += 8)
                *out |= (uint64_t)entry_of(signs + row * columns, first + i, columns, 8) << i;
        }
}
