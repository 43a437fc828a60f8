{# headers: math.h #}
/*
 * One step of a recurrent layer without gates. The state is written, and to result once more, which may be the state.
 */
static void {{ name }}_rnn_tanh_step(const float *input_gates, const float *state_gates, float *state, float *result,
    size_t batch, size_t size)
{
    for (size_t i = 0; i < batch * size; ++i) {
        state[i] = tanhf(input_gates[i] + state_gates[i]);
        result[i] = state[i];
    }
}
