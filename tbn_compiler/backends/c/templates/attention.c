{# needs: attention_sizes, attention_weights #}
/* Row by row: the scores of one query with all keys, their softmax, and the mean of the values with those weights. */
static void {{ name }}_attention(const {{ name }}_attention_sizes *sizes, const float *q, const float *k, const float *v,
    const float *mask, float *y, float *scores)
{
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
        float sum;

        for (ptrdiff_t key = 0; key < count; ++key) {
            float score = 0.0f;
            for (ptrdiff_t j = 0; j < (ptrdiff_t)sizes->width; ++j) {
                score += from[j * sizes->q[3]] * keys[key * sizes->k[2] + j * sizes->k[3]];
            }
            scores[key] = score;
        }
        sum = {{ name }}_attention_weights(sizes, shown, scores, count);
        for (ptrdiff_t j = 0; j < (ptrdiff_t)sizes->value_width; ++j) {
            float value = 0.0f;
            for (ptrdiff_t key = 0; key < count; ++key) {
                value += scores[key] * values[key * sizes->v[2] + j * sizes->v[3]];
            }
            to[j * sizes->y[3]] = sum != 0.0f ? value / sum : 0.0f;
        }
    }
}
