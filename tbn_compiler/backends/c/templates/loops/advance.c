{# Parameters: moved, the pointers that follow the loops. The end of a do that began with index and d. #}
        for (d = 6; d-- > 0;) {
{% for pointer in moved %}
            {{ pointer }} += loops->{{ pointer }}[d];
{% endfor %}
            if (++index[d] < loops->size[d]) {
                break;
            }
            /* The dimension is done: back to its begin, and on to the next outer one. */
            index[d] = 0;
{% for pointer in moved %}
            {{ pointer }} -= loops->{{ pointer }}[d] * (ptrdiff_t)loops->size[d];
{% endfor %}
        }
    } while (d < 6);
}
