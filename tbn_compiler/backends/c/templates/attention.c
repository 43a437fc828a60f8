{# needs: attention_sizes, attention_weights #}
/* Row by row: the scores of one query with all keys, their softmax, and the mean of the values with those weights. */
static void {{ name }}_attention(const {{ name }}_attention_sizes *sizes, const float *q, const float *k, const float *v,
    const float *mask, float *y, float *scores)
{
{% include "loops/attention_row.c" %}
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
