#include "{{ name }}.h"

#include <zephyr/init.h>
#include <zephyr/sys/printk.h>

/* Run the self-test before main, and print what it found. */
static int {{ name }}_print_self_test(void)
{
    const int failed = {{ name }}_self_test();

    if (failed == 0) {
        printk("{{ name }}: self-test passed\n");
    } else {
        printk("{{ name }}: self-test failed: output %d differs from the stored one\n", failed);
    }
    return 0;
}

SYS_INIT({{ name }}_print_self_test, APPLICATION, CONFIG_KERNEL_INIT_PRIORITY_DEFAULT);
