{# needs: logistic #}
{# headers: math.h #}
/*
 * One step of an LSTM. Of each sample the input and the state have 4 x size gates: input, forget, cell, output.
 * The cell state is read and written; the state is written, and to result once more, which may be the state.
 */
static void {{ name }}_lstm_step(const float *input_gates, const float *state_gates, float *cell, float *state,
    float *result, size_t batch, size_t size)
{
    for (size_t sample = 0; sample < batch; ++sample) {
        for (size_t i = 0; i < size; ++i) {
            const float in = {{ name }}_logistic(input_gates[i] + state_gates[i]);
            const float keep = {{ name }}_logistic(input_gates[size + i] + state_gates[size + i]);
            const float fresh = tanhf(input_gates[2 * size + i] + state_gates[2 * size + i]);
            const float out = {{ name }}_logistic(input_gates[3 * size + i] + state_gates[3 * size + i]);

            cell[i] = keep * cell[i] + in * fresh;
            state[i] = out * tanhf(cell[i]);
            result[i] = state[i];
        }
        input_gates += 4 * size;
        state_gates += 4 * size;
        cell += size;
        state += size;
        result += size;
    }
}
