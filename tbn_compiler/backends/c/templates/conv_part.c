{# needs: window #}
/* A convolution whose filters are taken side by side. */
typedef struct {
    size_t inputs;  /* channels that a filter reads */
    size_t outputs; /* filters of a group */
    size_t groups;
    size_t first_row; /* the output rows from first_row on and before end_row have all rows of the window in the image */
    size_t end_row;
    size_t first_column; /* and so have the columns */
    size_t end_column;
    int relu;
} {{ name }}_conv_layer;

/* What filters meet of an image: steps through it, and through the weights over those that lie outside. */
typedef struct {
    size_t channels;
    size_t rows;
    size_t columns;
    size_t channel_step;
    size_t row_step;
    size_t column_step;
    size_t position_step;   /* in the image, from an output position to the next one */
    size_t skipped_columns; /* weights behind each row */
    size_t skipped_rows;    /* weights behind each channel */
    size_t filter_size;
    size_t output_size;
    size_t result_step; /* from a position to the next one */
    int relu;
} {{ name }}_conv_part;
