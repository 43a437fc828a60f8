{# How each kind of step is described and called. #}
{% macro describe_tiled(layer) -%}
{{ layer.name | comment }}: tiled linear {{ layer.in_features }} -> {{ layer.out_features }}, p={{ layer.p }}
{%- if layer.p_in > 1 %} ({{ layer.p // layer.p_in }} x {{ layer.p_in }}){% endif %}
{%- if layer.shift %}, rolled by {{ layer.shift }}{% endif %}
, {{ layer.unique_rows }} unique rows, {{ layer.num_alphas }} alpha{{ "s" if layer.num_alphas > 1 }}
{%- if layer.input_alpha %}, input as {{ layer.replicas }} scaled copies{% endif %}
{%- if layer.bias %}, bias{% endif %}{% if layer.relu %}, ReLU{% endif %}
{%- endmacro %}
{% macro describe(step) -%}
{% if step.form == "tiled_linear" -%}
{{ describe_tiled(step.parameters) }}
{%- elif step.form == "linear" -%}
{{ step.layer | comment }}: float linear {{ step.in_features }} -> {{ step.out_features }}{% if step.bias %}, bias{% endif %}{% if step.relu %}, ReLU{% endif %}
{%- else -%}
{% if step.layer != step.node %}{{ step.layer | comment }}: {% endif %}
{% if step.kernel == "add_scalar" %}add {{ step.scalar | float }}
{%- elif step.form == "sum_neighbours" %}sum every {{ step.count }} neighbouring inputs
{%- else %}{{ step.kernel }}{% endif %}
{%- endif %}
{%- endmacro %}
{# A linear layer on more than one vector is called in a loop. #}
{% macro each_vector(step, in_features, out_features, arguments) -%}
{% if step.vectors == 1 %}
    {{ name }}_{{ step.kernel }}({{ arguments }}, {{ step.inputs[0] }}, {{ step.output }});
{%- else %}
    for (size_t i = 0; i < {{ step.vectors }}; ++i) {
        {{ name }}_{{ step.kernel }}({{ arguments }}, {{ step.inputs[0] }} + i * {{ in_features }}, {{ step.output }} + i * {{ out_features }});
    }
{%- endif %}
{%- endmacro %}
{% macro call(step) -%}
{% if step.form == "tiled_linear" %}
{% set layer = step.parameters %}
{{ each_vector(step, layer.input_size, layer.out_features, "&" ~ name ~ "_" ~ layer.symbol ~ ", " ~ name ~ "_" ~ layer.tile) }}
{%- elif step.form == "linear" %}
{% set bias = name ~ "_" ~ step.bias if step.bias else "NULL" %}
{{ each_vector(step, step.in_features, step.out_features, [name ~ "_" ~ step.weight, bias, step.in_features, step.out_features, step.relu | int] | join(", ")) }}
{%- elif step.form == "softmax" %}
    {{ name }}_softmax({{ step.inputs[0] }}, {{ step.output }}, {{ step.rows }}, {{ step.columns }});
{%- elif step.form == "sum_neighbours" %}
    {{ name }}_sum_neighbours({{ step.inputs[0] }}, {{ step.count }}, {{ step.output }}, {{ step.size }});
{%- elif step.form == "elementwise" and step.scalar is not none %}
    {{ name }}_{{ step.kernel }}({{ step.inputs[0] }}, {{ step.scalar | float }}, {{ step.output }}, {{ step.size }});
{%- else %}
    {{ name }}_{{ step.kernel }}({{ step.inputs | join(", ") }}, {{ step.output }}, {{ step.size }});
{%- endif %}
{%- endmacro %}
