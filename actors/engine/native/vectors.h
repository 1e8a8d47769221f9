/* Vectors of as many fp32 numbers as a register of this processor holds, and what is computed with them. */
#ifndef VECTORS_H
#define VECTORS_H
#include <math.h>
#include <stddef.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#else
#define LANES 8
#endif

typedef float vector __attribute__((vector_size(4 * LANES)));
typedef float unaligned __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int whole __attribute__((vector_size(4 * LANES)));
typedef union { vector all; float lanes[LANES]; } lanes;

/* A vector of the next numbers in memory; of the last ones, if `left` are fewer, with `filler` behind them. */
static inline vector next(const float *from, ptrdiff_t left, float filler)
{
    if (left >= LANES)
        return *(const unaligned *)from;
    lanes got = {(vector){0} + filler};
    memcpy(got.lanes, from, left * sizeof(float));
    return got.all;
}

/* Writes as many numbers as there is room `left` for. */
static inline void put(float *to, ptrdiff_t left, vector numbers)
{
    if (left >= LANES)
        *(unaligned *)to = numbers;
    else
        memcpy(to, &numbers, left * sizeof(float));
}

static inline float sum_of(lanes sums)
{
    /* In pairs, which do not wait for each other. */
#pragma GCC unroll 4
    for (int half = LANES / 2; half > 0; half /= 2)
#pragma GCC unroll 8
        for (int lane = 0; lane < half; lane++)
            sums.lanes[lane] += sums.lanes[lane + half];
    return sums.lanes[0];
}

/* exp(x) of numbers up to 0, to two units in the last place; 0 below the smallest normal number. 2^n times a polynomial
 * for the rest, between -ln(2)/2 and ln(2)/2 (Moshier, Cephes, expf). */
static inline vector exp_of(vector x)
{
    const float round = 12582912; /* added to a number, it leaves no place for a fraction */
    const vector n = (x * 1.44269504f + round) - round;
    const vector rest = x - n * 0.693359375f + n * 2.12194440e-4f;
    vector sum = rest * 1.9875691500e-4f + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1;
    const whole power = (__builtin_convertvector(n, whole) + 127) << 23, small = (whole)(x < (vector){0} - 87.33f);
    return (vector)((whole)(sum * (vector)power) & ~small);
}

#endif
