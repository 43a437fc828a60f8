/* Runs the model on every vector of floats from standard input. The argument is the size of a vector, as a check. */
#include "{{ header }}"

#include <stdio.h>
#include <stdlib.h>

static float input[{{ macro }}_INPUT_SIZE];
static float output[{{ macro }}_OUTPUT_SIZE];

int main(int argc, char **argv)
{
{% if scratch == "caller" %}
    void *const scratch = malloc({{ macro }}_SCRATCH_BYTES + 1);
{% endif %}

    if (argc != 2 || atol(argv[1]) != {{ macro }}_INPUT_SIZE) {
        fprintf(stderr, "the model's input has %ld elements\n", (long){{ macro }}_INPUT_SIZE);
        return 2;
    }
{% if scratch == "caller" %}
    if (scratch == NULL) {
        return 3;
    }
{% endif %}
    while (fread(input, sizeof(float), {{ macro }}_INPUT_SIZE, stdin) == {{ macro }}_INPUT_SIZE) {
        {{ name }}_run(input, output{{ ", scratch" if scratch == "caller" }});
        if (fwrite(output, sizeof(float), {{ macro }}_OUTPUT_SIZE, stdout) != {{ macro }}_OUTPUT_SIZE) {
            return 1;
        }
    }
{% if scratch == "caller" %}
    free(scratch);
{% endif %}
    return 0;
}
