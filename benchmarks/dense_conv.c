/*
 * A dense 3 x 3 convolution in float, stride 1, padding 1, ReLU: the peer of the tiled one. CHANNELS, SIZE and the arrays
 * weight [CHANNELS][CHANNELS][9] and bias come from the file that includes this one.
 *
 * As fast as plain C gets: the image is copied into a padded one first, so that no tap asks whether it is inside, and the
 * nine taps are unrolled.
 */
static float padded[CHANNELS][SIZE + 2][SIZE + 2];

void net_run(const float *input, float *output)
{
    for (int channel = 0; channel < CHANNELS; ++channel) {
        for (int row = 0; row < SIZE; ++row) {
            for (int column = 0; column < SIZE; ++column) {
                padded[channel][row + 1][column + 1] = *input++;
            }
        }
    }
    for (int filter = 0; filter < CHANNELS; ++filter) {
        for (int row = 0; row < SIZE; ++row) {
            for (int column = 0; column < SIZE; ++column) {
                const float *w = &weight[filter][0][0];
                const float *x = &padded[0][row][column];
                float sum = bias[filter];

                for (int channel = 0; channel < CHANNELS; ++channel) {
                    sum += w[0] * x[0] + w[1] * x[1] + w[2] * x[2];
                    sum += w[3] * x[SIZE + 2] + w[4] * x[SIZE + 3] + w[5] * x[SIZE + 4];
                    sum += w[6] * x[2 * SIZE + 4] + w[7] * x[2 * SIZE + 5] + w[8] * x[2 * SIZE + 6];
                    w += 9;
                    x += (SIZE + 2) * (SIZE + 2);
                }
                *output++ = sum < 0.0f ? 0.0f : sum;
            }
        }
    }
}
