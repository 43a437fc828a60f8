{# needs: attention_sizes, attention_weights #}
/*
 * Attention whose features are neighbours, of at least 4 keys and values of at least 4 features: 4 keys, then 4 features of the
 * values at a time. The last ones are the last 4, some of them once more.
 */
static void {{ name }}_attention_by_4(const {{ name }}_attention_sizes *sizes, const float *q, const float *k, const float *v,
    const float *mask, float *y, float *scores)
{
{% include "loops/attention_row.c" %}
        /* With fewer keys before the query the others are counted, too, and not used. */
        const ptrdiff_t scored = count < 4 ? 4 : count;
        float sum;

        for (ptrdiff_t next = 0; next < scored; next += 4) {
            const ptrdiff_t key = scored - next < 4 ? scored - 4 : next;
            const float *x = from;
            const float *k0 = keys + key * sizes->k[2];
            const float *k1 = k0 + sizes->k[2];
            const float *k2 = k1 + sizes->k[2];
            const float *k3 = k2 + sizes->k[2];
            float score0 = 0.0f;
            float score1 = 0.0f;
            float score2 = 0.0f;
            float score3 = 0.0f;

            for (size_t j = sizes->width; j != 0; --j) {
                const float feature = *x++;

                score0 += feature * *k0++;
                score1 += feature * *k1++;
                score2 += feature * *k2++;
                score3 += feature * *k3++;
            }
            scores[key] = score0;
            scores[key + 1] = score1;
            scores[key + 2] = score2;
            scores[key + 3] = score3;
        }
        sum = {{ name }}_attention_weights(sizes, shown, scores, count);
        for (size_t next = 0; next < sizes->value_width; next += 4) {
            const size_t j = sizes->value_width - next < 4 ? sizes->value_width - 4 : next;
            const float *value = values + j;
            float sum0 = 0.0f;
            float sum1 = 0.0f;
            float sum2 = 0.0f;
            float sum3 = 0.0f;

            for (ptrdiff_t key = 0; key < count; ++key) {
                const float weight = scores[key];

                sum0 += weight * value[0];
                sum1 += weight * value[1];
                sum2 += weight * value[2];
                sum3 += weight * value[3];
                value += sizes->v[2];
            }
            to[j] = sum != 0.0f ? sum0 / sum : 0.0f;
            to[j + 1] = sum != 0.0f ? sum1 / sum : 0.0f;
            to[j + 2] = sum != 0.0f ? sum2 / sum : 0.0f;
            to[j + 3] = sum != 0.0f ? sum3 / sum : 0.0f;
        }
    }
}
