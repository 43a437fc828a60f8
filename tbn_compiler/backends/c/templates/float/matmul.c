{# Parameters: kernel; columns, taken at once. #}
{% set several = columns > 1 %}
/* {{ name }}_matmul for at least 4 rows{{ " and %d columns" | format(columns) if several }}, which are taken at once; the last ones are the last, some of them once more. */
static void {{ name }}_{{ kernel }}(const {{ name }}_matmul_sizes *sizes, const float *a, const float *b, float *y)
{
{% include "loops/matmul_batch.c" %}
        for (size_t next = 0; next < sizes->rows; next += 4) {
            const size_t i = sizes->rows - next < 4 ? sizes->rows - 4 : next;

            for (size_t column = 0; column < sizes->columns; {{ "column += %d" | format(columns) if several else "++column" }}) {
{% if several %}
                const size_t j = sizes->columns - column < {{ columns }} ? sizes->columns - {{ columns }} : column;
{% else %}
                const size_t j = column;
{% endif %}
                const float *a0 = left + (ptrdiff_t)i * sizes->a[3];
{% for i in range(1, 4) %}
                const float *a{{ i }} = a{{ i - 1 }} + sizes->a[3];
{% endfor %}
                const float *b0 = right + (ptrdiff_t)j * sizes->b[4];
{% for j in range(1, columns) %}
                const float *b{{ j }} = b{{ j - 1 }} + sizes->b[4];
{% endfor %}
                float *const y0 = result + (ptrdiff_t)i * sizes->y[3] + (ptrdiff_t)j * sizes->y[4];
{% for j in range(1, columns) %}
                float *const y{{ j }} = y{{ j - 1 }} + sizes->y[4];
{% endfor %}
{% for i in range(4) %}
{% for j in range(columns) %}
                float sum{{ i }}{{ "_%d" | format(j) if several }} = 0.0f;
{% endfor %}
{% endfor %}

                for (size_t k = sizes->inner; k != 0; --k) {
{% for i in range(4) %}
{% for j in range(columns) %}
                    sum{{ i }}{{ "_%d" | format(j) if several }} += *a{{ i }} * *b{{ j }};
{% endfor %}
{% endfor %}
{% for i in range(4) %}
                    a{{ i }} += sizes->a[4];
{% endfor %}
{% for j in range(columns) %}
                    b{{ j }} += sizes->b[3];
{% endfor %}
                }
{% for j in range(columns) %}
                *y{{ j }} = sum0{{ "_%d" | format(j) if several }};
{% for i in range(1, 4) %}
                y{{ j }}[{{ "%d * " | format(i) if i > 1 }}sizes->y[3]] = sum{{ i }}{{ "_%d" | format(j) if several }};
{% endfor %}
{% endfor %}
            }
        }
    }
}
