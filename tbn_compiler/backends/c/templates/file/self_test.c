{% from "file/scratch.c" import scratch_union %}
{% set many = vectors.count > 1 %}
{# Arrays have a row for each input, if there are several. #}
{% set rows, row = ("[%d]" | format(vectors.count), "[vector]") if many else ("", "") %}
{% macro elements(array) %}
{% for numbers in array %}
{% if many %}
    {
{{ numbers | numbers | indent(4, first=True) }}
    }{{ "," if not loop.last }}
{% else %}
{{ numbers | numbers }}
{% endif %}
{% endfor %}
{% endmacro %}
{% if many %}
/* {{ vectors.count }} inputs and what PyTorch gave for them. */
{% else %}
/* One input and what PyTorch gave for it. */
{% endif %}
{% for port, array in zip(plan.inputs, vectors.inputs) %}
static const {{ types[array.dtype.name] }} {{ name }}_test_{{ port.name }}{{ rows }}[{{ macro }}_{{ port.name.upper() }}_SIZE] = {
{{ elements(array).rstrip() }}
};
{% endfor %}
{% for port, array in zip(plan.outputs, vectors.outputs) %}
static const {{ types[array.dtype.name] }} {{ name }}_test_{{ port.name }}{{ rows }}[{{ macro }}_{{ port.name.upper() }}_SIZE] = {
{{ elements(array).rstrip() }}
};
{% endfor %}

int {{ name }}_self_test(void)
{
{% if plan.states %}
    static {{ name }}_state state;
{% endif %}
{% for port in plan.outputs %}
    static {{ types[port.value.dtype] }} {{ port.name }}[{{ macro }}_{{ port.name.upper() }}_SIZE];
{% endfor %}
{% if many %}
{% for port, tolerance in zip(plan.outputs, vectors.tolerances) if port.value.dtype == "float32" %}
    static const float {{ port.name }}_tolerance[{{ vectors.count }}] = {
{{ tolerance | numbers | indent(4, first=True) }}
    };
{% endfor %}
{% endif %}
{% if plan.scratch == "caller" %}
{% if plan.scratch_types not in ((), ("float",)) %}
{{ scratch_union("scratch", macro ~ "_SCRATCH_BYTES", members, "    ") }}
{% else %}
    /* A model may need no scratch memory, an array needs an element. */
    static float scratch[{{ macro }}_SCRATCH_BYTES / sizeof(float) + ({{ macro }}_SCRATCH_BYTES == 0)];
{% endif %}
{% endif %}

{% set count = plan.outputs | length %}
{# One input through the model, and the comparison of its outputs. #}
{% macro checks() %}
    {{ name }}_run({{ test_arguments }});
{% for port, tolerance in zip(plan.outputs, vectors.tolerances) %}
{% set limit = port.name ~ "_tolerance[vector]" if many else tolerance[0] | float %}
{% set failed = loop.index if not many else "(int)vector + 1" if count == 1 else "(int)vector * %d + %d" | format(count, loop.index) %}
    for (size_t i = 0; i < {{ macro }}_{{ port.name.upper() }}_SIZE; ++i) {
{% if port.value.dtype == "float32" %}
        const float error = {{ port.name }}[i] - {{ name }}_test_{{ port.name }}{{ row }}[i];

        /* Not the other way round: NaN is an error too. */
        if (!(error <= {{ limit }} && error >= -{{ limit }})) {
            return {{ failed }};
        }
{% elif port.format %}
        const int error = {{ port.name }}[i] - {{ name }}_test_{{ port.name }}{{ row }}[i];

        /* PyTorch rounds floats, which may be next to the middle of two steps. */
        if (error > 1 || error < -1) {
            return {{ failed }};
        }
{% else %}
        if ({{ port.name }}[i] != {{ name }}_test_{{ port.name }}{{ row }}[i]) {
            return {{ failed }};
        }
{% endif %}
    }
{% endfor %}
{% endmacro %}
{% if plan.states %}
    {{ name }}_init(&state);
{% endif %}
{% if many %}
    for (size_t vector = 0; vector < {{ vectors.count }}; ++vector) {
{{ checks().rstrip() | indent(4, first=True) }}
    }
{% else %}
{{ checks().rstrip() }}
{% endif %}
    return 0;
}
