{# headers: math.h #}
static float {{ name }}_logistic(float x)
{
    return 1.0f / (1.0f + expf(-x));
}
