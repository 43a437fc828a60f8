{# The loop over queries, and where one of them and its keys and values stand. #}
    const size_t rows = sizes->size[0] * sizes->size[1] * sizes->size[2];

    for (size_t row = 0; row < rows; ++row) {
        const ptrdiff_t query = (ptrdiff_t)(row % sizes->size[2]);
        const ptrdiff_t head = (ptrdiff_t)(row / sizes->size[2] % sizes->size[1]);
        const ptrdiff_t batch = (ptrdiff_t)(row / sizes->size[2] / sizes->size[1]);
        const float *const from = q + batch * sizes->q[0] + head * sizes->q[1] + query * sizes->q[2];
        const float *const keys = k + batch * sizes->k[0] + head * sizes->k[1];
        const float *const values = v + batch * sizes->v[0] + head * sizes->v[1];
        const float *const shown =
            mask != NULL ? mask + batch * sizes->mask[0] + head * sizes->mask[1] + query * sizes->mask[2] : NULL;
        float *const to = y + batch * sizes->y[0] + head * sizes->y[1] + query * sizes->y[2];
        const ptrdiff_t count =
            (sizes->causal && query + 1 < (ptrdiff_t)sizes->size[3]) ? query + 1 : (ptrdiff_t)sizes->size[3];
