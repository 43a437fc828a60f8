{# needs: logistic #}
{# headers: math.h #}
/*
 * One step of a GRU. Of each sample the input and the state have 3 x size gates: reset, update, new.
 * The state is read and written, and written to result once more, which may be the state.
 */
static void {{ name }}_gru_step(const float *input_gates, const float *state_gates, float *state, float *result,
    size_t batch, size_t size)
{
    for (size_t sample = 0; sample < batch; ++sample) {
        for (size_t i = 0; i < size; ++i) {
            const float reset = {{ name }}_logistic(input_gates[i] + state_gates[i]);
            const float update = {{ name }}_logistic(input_gates[size + i] + state_gates[size + i]);
            const float fresh = tanhf(input_gates[2 * size + i] + reset * state_gates[2 * size + i]);

            state[i] = fresh + update * (state[i] - fresh);
            result[i] = state[i];
        }
        input_gates += 3 * size;
        state_gates += 3 * size;
        state += size;
        result += size;
    }
}
