{% from "file/scratch.c" import scratch_union %}
// Runs the model on one stored input, and prints the results beside those that PyTorch gave.
#include <{{ name }}.h>

{% for port, array in zip(plan.inputs, vectors.inputs) %}
static const {{ types[array.dtype.name] }} {{ port.name }}[{{ macro }}_{{ port.name.upper() }}_SIZE] = {
{{ array[0] | numbers }}
};
{% endfor %}
{% for port, array in zip(plan.outputs, vectors.outputs) %}
static const {{ types[array.dtype.name] }} expected_{{ port.name }}[{{ macro }}_{{ port.name.upper() }}_SIZE] = {
{{ array[0] | numbers }}
};
static {{ types[array.dtype.name] }} {{ port.name }}[{{ macro }}_{{ port.name.upper() }}_SIZE];
{% endfor %}
{% if plan.states %}
static {{ name }}_state state;
{% endif %}
{% if plan.scratch == "caller" %}
{% if plan.scratch_types not in ((), ("float",)) %}
{{ scratch_union("scratch", macro ~ "_SCRATCH_BYTES", members) }}
{% else %}
static float scratch[{{ macro }}_SCRATCH_BYTES / sizeof(float) + 1];
{% endif %}
{% endif %}

void setup()
{
    Serial.begin(115200);
}

void loop()
{
{% if plan.states %}
    {{ name }}_init(&state);
{% endif %}
    const unsigned long start = micros();
    {{ name }}_run({{ arguments }});
    const unsigned long elapsed = micros() - start;

    Serial.print("microseconds: ");
    Serial.println(elapsed);
{% for port in plan.outputs %}
    for (unsigned long i = 0; i < {{ macro }}_{{ port.name.upper() }}_SIZE; ++i) {
        Serial.print("{{ port.name }}, expected: ");
        Serial.print({{ port.name }}[i]{{ ", 6" if port.value.dtype == "float32" }});
        Serial.print(", ");
        Serial.println(expected_{{ port.name }}[i]{{ ", 6" if port.value.dtype == "float32" }});
    }
{% endfor %}
    delay(1000);
}
