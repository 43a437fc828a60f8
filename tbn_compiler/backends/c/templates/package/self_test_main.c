#include "{{ name }}.h"

#include <stdio.h>

int main(void)
{
    const int output = {{ name }}_self_test();

    if (output != 0) {
        fprintf(stderr, "{{ name }}: output %d differs from the stored one\n", output);
    }
    return output;
}
