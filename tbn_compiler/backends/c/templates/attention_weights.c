{# needs: attention_sizes #}
{# headers: math.h #}
/*
 * The weights of count keys from their scores: exp of what they exceed the largest one by; the sum is 1 once they are divided
 * by the result. mask is the query's, or NULL.
 */
static float {{ name }}_attention_weights(const {{ name }}_attention_sizes *sizes, const float *mask, float *scores, ptrdiff_t count)
{
    float largest = -INFINITY;
    float sum = 0.0f;

    for (ptrdiff_t key = 0; key < count; ++key) {
        float score = scores[key] * sizes->scale;
        if (mask != NULL) {
            score += mask[key * sizes->mask[3]];
        }
        scores[key] = score;
        largest = score > largest ? score : largest;
    }
    if (largest == -INFINITY) {
        largest = 0.0f; /* all keys are masked: no weight is counted, and the result is 0 */
    }
    for (ptrdiff_t key = 0; key < count; ++key) {
        scores[key] = expf(scores[key] - largest);
        sum += scores[key];
    }
    return sum;
}
