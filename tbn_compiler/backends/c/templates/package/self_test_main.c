#include "{{ name }}.h"

#include <stdio.h>

int main(void)
{
    const int failed = {{ name }}_self_test();

    if (failed != 0) {
        fprintf(stderr, "{{ name }}: output %d differs from the stored one\n", failed);
    }
    return failed != 0;
}
