void {{ name }}_init({{ name }}_state *state)
{
{% if plan.states | selectattr("initial") | list %}
{% for state in plan.states %}
{% if state.initial %}
    memcpy(state->{{ state.name }}, {{ name }}_{{ state.initial }}, sizeof state->{{ state.name }});
{% else %}
    memset(state->{{ state.name }}, 0, sizeof state->{{ state.name }});
{% endif %}
{% endfor %}
{% else %}
    memset(state, 0, sizeof *state);
{% endif %}
}

