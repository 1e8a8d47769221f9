/* Norms, activations and writes to a cache, by one thread. */
#include "rowwise.h"

#include "vectors.h"

static inline float dot(const float *a, const float *b, int size)
{
    lanes sums = {{0}};
    float sum = 0;
    int d = 0;
    for (; d + LANES <= size; d += LANES)
        sums.all += *(const unaligned *)(a + d) * *(const unaligned *)(b + d);
    for (; d < size; d++)
        sum += a[d] * b[d];
    return sum + sum_of(sums);
}

/* Copies `count` times `heads` vectors of `size` numbers, each token's `stride` after the last one's, to addresses
 * (in vectors) of a cache. */
void store(const float *vectors, float *cache, const long *addresses, long stride, int count, int heads, int size)
{
    for (long n = 0; n < count; n++)
        for (long head = 0; head < heads; head++)
            memcpy(cache + addresses[n * heads + head] * size, vectors + n * stride + head * size,
                   size * sizeof(float));
}

/* Root mean square normalisation of each row of x [rows, size] (Zhang and Sennrich 2019). */
void rms_norm(const float *x, const float *weight, float *out, int rows, int size, float epsilon)
{
    for (long r = 0; r < rows; r++, x += size, out += size) {
        const float scale = 1 / sqrtf(dot(x, x, size) / size + epsilon);
        for (int c = 0; c < size; c++)
            out[c] = x[c] * scale * weight[c];
    }
}

/* Layer normalisation of each row of x [rows, size] (Ba et al. 2016), plus `bias`. */
void layer_norm(const float *x, const float *weight, const float *bias, float *out, int rows, int size, float epsilon)
{
    for (long r = 0; r < rows; r++, x += size, out += size) {
        lanes sums = {{0}}, squares = {{0}};
        for (int c = 0; c < size; c += LANES)
            sums.all += next(x + c, size - c, 0);
        const float mean = sum_of(sums) / size;
        for (int c = 0; c < size; c += LANES) {
            const vector from_mean = next(x + c, size - c, mean) - mean;
            squares.all += from_mean * from_mean;
        }
        const float scale = 1 / sqrtf(sum_of(squares) / size + epsilon);
        for (int c = 0; c < size; c++)
            out[c] = (x[c] - mean) * scale * weight[c] + bias[c];
    }
}

/* 1 / (1 + exp(-x)) */
static inline vector sigmoid(vector x)
{
    const whole negative = x < (vector){0};
    const vector size = (vector)((whole)x & 0x7fffffff), small = exp_of(-size), share = 1 / (1 + small);
    return (vector)(((whole)(small * share) & negative) | ((whole)share & ~negative));
}

/* The share of a normal distribution below x, to 1e-7 (Abramowitz and Stegun 7.1.26). */
static inline vector normal_below(vector x)
{
    const whole negative = x < (vector){0};
    const vector size = (vector)((whole)x & 0x7fffffff) * 0.70710678f, t = 1 / (1 + 0.3275911f * size);
    const vector sum = (((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f;
    const vector beyond = 0.5f * sum * t * exp_of(-size * size);
    return (vector)(((whole)beyond & negative) | ((whole)(1 - beyond) & ~negative));
}

static inline vector activated(vector x, int kind)
{
    if (kind == 0)
        return x * normal_below(x);
    return x * sigmoid(kind == 1 ? x : 1.59576912f * (x + 0.044715f * x * x * x));
}

/* An activation of each row of `gate` [rows, size], whose rows lie `stride` numbers apart, times those of `up`, which
 * lie likewise, unless that is NULL. 0: GELU; 1: SiLU; 2: GELU by tanh (Hendrycks and Gimpel 2016). */
void activate(const float *gate, const float *up, float *out, long rows, int size, long stride, int kind)
{
    for (long r = 0; r < rows; r++, gate += stride, out += size) {
        for (int c = 0; c < size; c += LANES) {
            const vector found = activated(next(gate + c, size - c, 0), kind);
            put(out + c, size - c, up ? found * next(up + c, size - c, 0) : found);
        }
        up = up ? up + stride : NULL;
    }
}
