{% from "file/scratch.c" import scratch_union %}
/* One input, and what PyTorch gave for it in each of {{ vectors.steps }} runs that follow one another. */
{% for port, array in zip(plan.inputs, vectors.inputs) %}
static const {{ types[array.dtype.name] }} {{ name }}_test_{{ port.name }}[{{ macro }}_{{ port.name.upper() }}_SIZE] = {
{{ array | numbers }}
};
{% endfor %}
{% for port, array in zip(plan.outputs, vectors.outputs) %}
static const {{ types[array.dtype.name] }} {{ name }}_test_{{ port.name }}[{{ vectors.steps }} * {{ macro }}_{{ port.name.upper() }}_SIZE] = {
{{ array | numbers }}
};
{% endfor %}

int {{ name }}_self_test(void)
{
    static {{ name }}_state state;
{% for port in plan.outputs %}
    static {{ types[port.value.dtype] }} {{ port.name }}[{{ macro }}_{{ port.name.upper() }}_SIZE];
{% endfor %}
{% if plan.scratch == "caller" %}
{% if plan.scratch_types not in ((), ("float",)) %}
{{ scratch_union("scratch", macro ~ "_SCRATCH_BYTES", members, "    ") }}
{% else %}
    /* A model may need no scratch memory, an array needs an element. */
    static float scratch[{{ macro }}_SCRATCH_BYTES / sizeof(float) + ({{ macro }}_SCRATCH_BYTES == 0)];
{% endif %}
{% endif %}

    {{ name }}_init(&state);
    for (size_t step = 0; step < {{ vectors.steps }}; ++step) {
        {{ name }}_run({{ test_arguments }});
{% for port, tolerance in zip(plan.outputs, vectors.tolerances) %}
        for (size_t i = 0; i < {{ macro }}_{{ port.name.upper() }}_SIZE; ++i) {
{% if port.value.dtype == "float32" %}
            const float error = {{ port.name }}[i] - {{ name }}_test_{{ port.name }}[step * {{ macro }}_{{ port.name.upper() }}_SIZE + i];

            /* Not the other way round: NaN is an error too. */
            if (!(error <= {{ tolerance | float }} && error >= -{{ tolerance | float }})) {
                return {{ loop.index }};
            }
{% elif port.format %}
            const int error = {{ port.name }}[i] - {{ name }}_test_{{ port.name }}[step * {{ macro }}_{{ port.name.upper() }}_SIZE + i];

            /* PyTorch rounds floats, which may be next to the middle of two steps. */
            if (error > 1 || error < -1) {
                return {{ loop.index }};
            }
{% else %}
            if ({{ port.name }}[i] != {{ name }}_test_{{ port.name }}[step * {{ macro }}_{{ port.name.upper() }}_SIZE + i]) {
                return {{ loop.index }};
            }
{% endif %}
        }
{% endfor %}
    }
    return 0;
}
