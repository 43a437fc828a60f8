{# Where the results of a layer on int8 stand; what differs follows. #}
    size_t rows;
    size_t parts;     /* of the inputs, with sums of their own */
    size_t part_sums; /* of each part */
    size_t repeats;   /* of each row among the outputs */
    size_t width;     /* positions of a line */
    size_t lines;     /* of a sample */
    size_t sample_stride;
    size_t line_stride;
    size_t position_stride;
    size_t output_stride;
