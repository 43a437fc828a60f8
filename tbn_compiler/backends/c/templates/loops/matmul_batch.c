{# The loop over leading dimensions, and where the matrices of one product stand. #}
    const size_t batches = sizes->batch[0] * sizes->batch[1] * sizes->batch[2];

    for (size_t batch = 0; batch < batches; ++batch) {
        const ptrdiff_t outer = (ptrdiff_t)(batch / sizes->batch[2] / sizes->batch[1]);
        const ptrdiff_t middle = (ptrdiff_t)(batch / sizes->batch[2] % sizes->batch[1]);
        const ptrdiff_t inner = (ptrdiff_t)(batch % sizes->batch[2]);
        const float *const left = a + outer * sizes->a[0] + middle * sizes->a[1] + inner * sizes->a[2];
        const float *const right = b + outer * sizes->b[0] + middle * sizes->b[1] + inner * sizes->b[2];
        float *const result = y + outer * sizes->y[0] + middle * sizes->y[1] + inner * sizes->y[2];

