{% if interface.inputs %}
/* Runs the model on all inputs from standard input, one run after the other. The argument checks their size. */
{% else %}
/* Runs the model once: its inputs are all state. The argument is 0, their size. */
{% endif %}
#include "{{ header }}"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

{% for argument in interface.inputs %}
static {{ types[argument.dtype.name] }} input_{{ loop.index0 }}[{{ argument.size }}];
{% endfor %}
{% for argument in interface.outputs %}
static {{ types[argument.dtype.name] }} output_{{ loop.index0 }}[{{ argument.size }}];
{% endfor %}
{% if interface.state_bytes %}
static {{ interface.name }}_state state;
{% endif %}

{% if interface.inputs %}
/* Fill all inputs; 0 at the end of the file. */
static int read_inputs(void)
{
{% for argument in interface.inputs %}
    if (fread(input_{{ loop.index0 }}, sizeof input_{{ loop.index0 }}, 1, stdin) != 1) {
        return 0;
    }
{% endfor %}
    return 1;
}

{% endif %}
int main(int argc, char **argv)
{
{% if interface.takes_scratch %}
    void *const scratch = malloc({{ interface.scratch_bytes }} + 1);

    if (scratch == NULL) {
        return 3;
    }
{% endif %}
    if (argc != 2 || atol(argv[1]) != {{ interface.input_size }}) {
        fprintf(stderr, "the model's input has {{ interface.input_size }} elements\n");
        return 2;
    }
{% if interface.state_bytes %}
    {{ interface.name }}_init(&state);
{% endif %}
    {{ "while (read_inputs()) " if interface.inputs }}{
        {{ interface.name }}_run({{ arguments }});
{% for argument in interface.outputs %}
        if (fwrite(output_{{ loop.index0 }}, sizeof output_{{ loop.index0 }}, 1, stdout) != 1) {
            return 1;
        }
{% endfor %}
    }
{% if interface.takes_scratch %}
    free(scratch);
{% endif %}
    return 0;
}
