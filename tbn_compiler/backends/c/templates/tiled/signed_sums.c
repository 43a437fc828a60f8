{# Parameters: kernel; number, the type of the sums. #}
/* Sums of eight values: sums[b] adds those with bit b of the index set, subtracts the others; sums[3] subtracts all. */
static void {{ name }}_{{ kernel }}(const {{ number }} *value, {{ number }} *sums)
{
    const {{ number }} pair0 = value[0] + value[1];
    const {{ number }} pair1 = value[2] + value[3];
    const {{ number }} pair2 = value[4] + value[5];
    const {{ number }} pair3 = value[6] + value[7];
    const {{ number }} low = pair0 + pair1;
    const {{ number }} high = pair2 + pair3;

    sums[0] = ((value[1] - value[0]) + (value[3] - value[2])) + ((value[5] - value[4]) + (value[7] - value[6]));
    sums[1] = (pair1 - pair0) + (pair3 - pair2);
    sums[2] = high - low;
    sums[3] = -(low + high);
}
