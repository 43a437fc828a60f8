{# needs: matmul_sizes #}
static void {{ name }}_matmul(const {{ name }}_matmul_sizes *sizes, const float *a, const float *b, float *y)
{
    const size_t batches = sizes->batch[0] * sizes->batch[1] * sizes->batch[2];

    for (size_t batch = 0; batch < batches; ++batch) {
        const ptrdiff_t outer = (ptrdiff_t)(batch / sizes->batch[2] / sizes->batch[1]);
        const ptrdiff_t middle = (ptrdiff_t)(batch / sizes->batch[2] % sizes->batch[1]);
        const ptrdiff_t inner = (ptrdiff_t)(batch % sizes->batch[2]);
        const float *const left = a + outer * sizes->a[0] + middle * sizes->a[1] + inner * sizes->a[2];
        const float *const right = b + outer * sizes->b[0] + middle * sizes->b[1] + inner * sizes->b[2];
        float *const result = y + outer * sizes->y[0] + middle * sizes->y[1] + inner * sizes->y[2];

        for (ptrdiff_t i = 0; i < (ptrdiff_t)sizes->rows; ++i) {
            for (ptrdiff_t j = 0; j < (ptrdiff_t)sizes->columns; ++j) {
                float value = 0.0f;
                for (ptrdiff_t k = 0; k < (ptrdiff_t)sizes->inner; ++k) {
                    value += left[i * sizes->a[3] + k * sizes->a[4]] * right[k * sizes->b[3] + j * sizes->b[4]];
                }
                result[i * sizes->y[3] + j * sizes->y[4]] = value;
            }
        }
    }
}
