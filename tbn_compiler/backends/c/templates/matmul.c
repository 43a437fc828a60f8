{# needs: matmul_sizes #}
static void {{ name }}_matmul(const {{ name }}_matmul_sizes *sizes, const float *a, const float *b, float *y)
{
{% include "loops/matmul_batch.c" %}
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
