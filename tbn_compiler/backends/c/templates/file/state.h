{# The state of a model: its structure, and the function that fills it for the first time. #}
/* What the model keeps from run to run, in your memory. Each run reads it and writes the next values. */
typedef struct {
{% for state in plan.states %}
    {{ types[state.value.dtype] }} {{ state.name }}[{{ state.value.size }}]; /* {{ state.value.shape | shape }}, input {{ state.before }} and output {{ state.output }} of the model{{ ", first " ~ name ~ "_" ~ state.initial if state.initial }} */
{% endfor %}
} {{ name }}_state;

#define {{ macro }}_STATE_BYTES {{ plan.state_bytes }} /* sizeof({{ name }}_state) */

/* Fill a state for the first run. States are independent of each other. */
void {{ name }}_init({{ name }}_state *state);

