/*
 * One step of a recurrent layer without gates. The state is written, and to result once more, which may be the state.
 */
static void {{ name }}_rnn_relu_step(const float *input_gates, const float *state_gates, float *state, float *result,
    size_t batch, size_t size)
{
    for (size_t i = 0; i < batch * size; ++i) {
        const float sum = input_gates[i] + state_gates[i];

        state[i] = sum < 0.0f ? 0.0f : sum;
        result[i] = state[i];
    }
}
