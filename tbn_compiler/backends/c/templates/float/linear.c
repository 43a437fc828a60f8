{# Parameters: kernel; vectors, taken at once. #}
{% set several = vectors > 1 %}
/*
 * weight [out_features x in_features], bias of out_features elements or NULL. 4 rows at a time; the last ones are the last 4,
 * some of them once more.{{ " So it is with vectors, %d at a time." | format(vectors) if several }}
 */
static void {{ name }}_{{ kernel }}(const float *weight, const float *bias, size_t in_features, size_t out_features,{{ " int relu,\n   " if not several }}{{ "\n    size_t vectors, int relu," if several }} const float *x, float *y)
{
{% set pad = "    " if several else "" %}
{% if several %}
    for (size_t vector = 0; vector < vectors; vector += {{ vectors }}) {
        const size_t first = vectors - vector < {{ vectors }} ? vectors - {{ vectors }} : vector;
        const float *const input = x + first * in_features;
        float *const output = y + first * out_features;

{% endif %}
{{ pad }}    for (size_t next = 0; next < out_features; next += 4) {
{{ pad }}        const size_t row = out_features - next < 4 ? out_features - 4 : next;
{{ pad }}        const float *w0 = weight + row * in_features;
{% for i in range(1, 4) %}
{{ pad }}        const float *w{{ i }} = w{{ i - 1 }} + in_features;
{% endfor %}
{% for v in range(vectors) %}
{{ pad }}        const float *x{{ v }} = {{ "x" if not several else "input" if v == 0 else "x%d + in_features" | format(v - 1) }};
{% endfor %}
{% for v in range(vectors) %}
{{ pad }}        float *const y{{ v }} = {{ "y + row" if not several else "output + row" if v == 0 else "y%d + out_features" | format(v - 1) }};
{% endfor %}
{% for i in range(4) %}
{% for v in range(vectors) %}
{{ pad }}        float sum{{ i }}{{ "_%d" | format(v) if several }} = 0.0f;
{% endfor %}
{% endfor %}

{{ pad }}        for (size_t j = in_features; j != 0; --j) {
{% for v in range(vectors) %}
{{ pad }}            const float value{{ v if several }} = *x{{ v }}++;
{% endfor %}

{% for i in range(4) %}
{% for v in range(vectors) %}
{{ pad }}            sum{{ i }}{{ "_%d" | format(v) if several }} += *w{{ i }}{{ "++" if v == vectors - 1 }} * value{{ v if several }};
{% endfor %}
{% endfor %}
{{ pad }}        }
{{ pad }}        if (bias != NULL) {
{% for i in range(4) %}
{% for v in range(vectors) %}
{{ pad }}            sum{{ i }}{{ "_%d" | format(v) if several }} += bias[row{{ " + %d" | format(i) if i }}];
{% endfor %}
{% endfor %}
{{ pad }}        }
{% for v in range(vectors) %}
{% for i in range(4) %}
{{ pad }}        y{{ v }}[{{ i }}] = {{ name }}_activate(sum{{ i }}{{ "_%d" | format(v) if several }}, relu);
{% endfor %}
{% endfor %}
{{ pad }}    }
{{ "    }\n" if several }}}
