# Zephyr adds this folder to its build; CONFIG_TBN_{{ macro }}=y in prj.conf turns the model on.
if(CONFIG_TBN_{{ macro }})
    zephyr_library_named(tbn_{{ name }})
    zephyr_library_sources(src/{{ name }}.c)
    zephyr_library_sources_ifdef(CONFIG_TBN_{{ macro }}_SELF_TEST zephyr/self_test.c)
    zephyr_include_directories(include)
endif()
