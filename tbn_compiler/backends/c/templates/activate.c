/* The value that a layer stores: with a ReLU, negative values become 0 (and NaN stays). */
static float {{ name }}_activate(float value, int relu)
{
    return (relu && value < 0.0f) ? 0.0f : value;
}
