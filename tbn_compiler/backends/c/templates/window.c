/* How a window slides over the channels of an image; what lies outside the image is padding. */
typedef struct {
    size_t input_height;
    size_t input_width;
    size_t output_height;
    size_t output_width;
    size_t kernel_height;
    size_t kernel_width;
    size_t stride_height;
    size_t stride_width;
    size_t padding_height; /* rows above the image */
    size_t padding_width;  /* columns left of it */
    size_t dilation_height;
    size_t dilation_width;
} {{ name }}_window;
