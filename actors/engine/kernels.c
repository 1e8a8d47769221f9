/* What decoding on a CPU in fp32 consists of, for the processor that this is compiled on; `kernels.py` calls it.
 *
 * The results of a row (a token) are summed up in an order that depends neither on the rows beside it nor on the number
 * of threads.
 */
#include <math.h>
#include <stddef.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#else
#define LANES 8
#endif
#define WIDE (2 * LANES)
/* Rows of a tile, whose sums fill the registers. */
#define MOST_ROWS 6
/* Rows that go through all panels before the next ones do: those of 1024 numbers stay in a cache of 512 KB. */
#define BLOCK 96
/* Rows of a panel that are fetched ahead. With the processor's own prefetching alone, 16 rows times 512 x 8192 take
 * 1.4 times as long on a Zen 3. */
#define AHEAD 24

typedef float vector __attribute__((vector_size(4 * LANES)));
typedef float unaligned __attribute__((vector_size(4 * LANES), aligned(4)));

/* `rows` of x times one panel, or several, of a weight. The weight lies in panels of WIDE columns, each one row of the
 * panel after the other, so that it is read in the order in which it lies in memory. The columns' `bias`, unless NULL,
 * is what sums begin with, and with `add` what `out` holds as well. */
static inline __attribute__((always_inline)) void tile(
    const int rows, const int panels, const float *restrict x, const float *restrict weight,
    const float *restrict bias, float *restrict out, ptrdiff_t stride, ptrdiff_t inner, int add)
{
    vector sum[MOST_ROWS][8], part[8];
#pragma GCC unroll 8
    for (int v = 0; v < 2 * panels; v++) {
        const vector first = bias ? *(const unaligned *)(bias + v * LANES) : (vector){0};
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
            sum[r][v] = add ? first + *(const unaligned *)(out + r * stride + v * LANES) : first;
    }
    for (ptrdiff_t k = 0; k < inner; k++) {
#pragma GCC unroll 8
        for (int v = 0; v < 2 * panels; v++) {
            const float *from = weight + (v / 2 * inner + k) * WIDE + v % 2 * LANES;
            part[v] = *(const unaligned *)from;
            if (v % 2 == 0)
                __builtin_prefetch(from + AHEAD * WIDE);
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            const float value = x[r * inner + k];
#pragma GCC unroll 8
            for (int v = 0; v < 2 * panels; v++)
                sum[r][v] += value * part[v];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < 2 * panels; v++)
            *(unaligned *)(out + r * stride + v * LANES) = sum[r][v];
}

#define TILE(ROWS, PANELS)                                                                                       \
    static __attribute__((noinline)) void tile_##ROWS##_##PANELS(                                                \
        const float *x, const float *weight, const float *bias, float *out, ptrdiff_t stride, ptrdiff_t inner,   \
        int add)                                                                                                 \
    {                                                                                                            \
        tile(ROWS, PANELS, x, weight, bias, out, stride, inner, add);                                            \
    }
TILE(1, 1) TILE(2, 1) TILE(3, 1) TILE(4, 1) TILE(5, 1) TILE(6, 1)
/* With one or two rows, sums of one panel are too few to keep the arithmetic busy. */
TILE(1, 4) TILE(2, 2)

typedef void (*kernel)(const float *, const float *, const float *, float *, ptrdiff_t, ptrdiff_t, int);
static const kernel TILES[] = {tile_1_1, tile_2_1, tile_3_1, tile_4_1, tile_5_1, tile_6_1};

/* All rows times one panel, in tiles of like height. */
static void strip(const float *x, const float *weight, const float *bias, float *out, ptrdiff_t stride, int rows,
                  ptrdiff_t inner, int add)
{
    for (int tiles = (rows + MOST_ROWS - 1) / MOST_ROWS; tiles > 0; tiles--) {
        const int height = (rows + tiles - 1) / tiles;
        TILES[height - 1](x, weight, bias, out, stride, inner, add);
        x += height * inner;
        out += height * stride;
        rows -= height;
    }
}

/* The last panel's columns beyond `cols` go to a buffer and no further. */
static void edge(const float *x, const float *weight, const float *bias, float *out, int rows, ptrdiff_t inner,
                 ptrdiff_t cols, int add)
{
    float buffer[BLOCK * WIDE] = {0};
    const size_t size = cols % WIDE * sizeof(float);
    for (int r = 0; add && r < rows; r++)
        memcpy(buffer + r * WIDE, out + r * cols, size);
    strip(x, weight, bias, buffer, WIDE, rows, inner, add);
    for (int r = 0; r < rows; r++)
        memcpy(out + r * cols, buffer + r * WIDE, size);
}

static void block(const float *x, const float *weight, const float *bias, float *out, int rows, ptrdiff_t inner,
                  ptrdiff_t cols, int add, int panel, int last)
{
    while (panel < last) {
        const float *from = weight + panel * inner * WIDE, *offset = bias ? bias + panel * WIDE : NULL;
        float *to = out + panel * WIDE;
        int panels = 1;
        if (rows == 1 && (panel + 4) * WIDE <= cols && panel + 4 <= last)
            tile_1_4(x, from, offset, to, cols, inner, add), panels = 4;
        else if (rows == 2 && (panel + 2) * WIDE <= cols && panel + 2 <= last)
            tile_2_2(x, from, offset, to, cols, inner, add), panels = 2;
        else if ((panel + 1) * WIDE <= cols)
            strip(x, from, offset, to, cols, rows, inner, add);
        else
            edge(x, from, offset, to, rows, inner, cols, add);
        panel += panels;
    }
}

/* Columns of a panel. */
int panel_width(void) { return WIDE; }

/* out [rows, cols] = x [rows, inner] * weight, plus `bias` unless that is NULL, or that added to what `out` holds. Of
 * weight and bias there are columns up to a multiple of the panel's. */
void product(const float *x, const float *weight, const float *bias, float *out, int rows, int inner, int cols, int add,
             int threads)
{
    const int panels = (cols + WIDE - 1) / WIDE;
    /* Several parts a thread, as another process may have taken one of the cores for a while. */
    const int parts = threads == 1 ? 1 : panels < 4 * threads ? panels : 4 * threads;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int part = 0; part < parts; part++) {
        const int first = (long)panels * part / parts, last = (long)panels * (part + 1) / parts;
        for (int row = 0; row < rows; row += BLOCK)
            block(x + (ptrdiff_t)row * inner, weight, bias, out + (ptrdiff_t)row * cols,
                  rows - row < BLOCK ? rows - row : BLOCK, inner, cols, add, first, last);
    }
}

typedef int whole __attribute__((vector_size(4 * LANES)));
typedef union { vector all; float lanes[LANES]; } lanes;

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

/* One query over the keys and values of its head, [length, size] each; `weights` is room for `length` numbers. `bias`,
 * unless NULL, is what the head adds to the score of a position by its distance from the last. */
static void attend_one(const float *query, const float *keys, const float *values, const float *bias, float *weights,
                       float *out, int length, int size, float scale)
{
    float highest = -INFINITY;
    for (int l = 0; l < length; l++) {
        weights[l] = scale * dot(query, keys + (ptrdiff_t)l * size, size) + (bias ? bias[length - 1 - l] : 0);
        /* A NaN becomes the highest and makes all weights NaN. */
        highest = weights[l] <= highest ? highest : weights[l];
    }
    lanes sums = {{0}};
    for (int l = 0; l < length; l += LANES) {
        const vector found = exp_of(next(weights + l, length - l, -INFINITY) - highest);
        put(weights + l, length - l, found);
        sums.all += found;
    }
    const float total = sum_of(sums);
    int d = 0;
    for (; d + 4 * LANES <= size; d += 4 * LANES) {
        vector sums[4] = {0};
        for (int l = 0; l < length; l++)
#pragma GCC unroll 4
            for (int v = 0; v < 4; v++)
                sums[v] += weights[l] * *(const unaligned *)(values + (ptrdiff_t)l * size + d + v * LANES);
        for (int v = 0; v < 4; v++)
            *(unaligned *)(out + d + v * LANES) = sums[v] / total;
    }
    for (; d < size; d++) {
        float sum = 0;
        for (int l = 0; l < length; l++)
            sum += weights[l] * values[(ptrdiff_t)l * size + d];
        out[d] = sum / total;
    }
}

/* One new token of each of `count` sequences over the rows of a cache of [row, kv head, position, size]: queries and
 * `out` are [count, kv heads * group, size], of which queries may lie `stride` numbers apart. */
void attend(const float *queries, const float *keys, const float *values, const float *bias, float *weights,
            float *out, const long *rows, const long *lengths, long longest, long stride, long row_stride,
            long head_stride, long bias_stride, int count, int kv_heads, int group, int size, float scale, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int n = 0; n < count * kv_heads; n++) {
        const long token = n / kv_heads, head = n % kv_heads, start = rows[token] * row_stride + head * head_stride;
        for (int g = 0; g < group; g++) {
            const long query = head * group + g, place = token * kv_heads * group + query;
            attend_one(queries + token * stride + query * size, keys + start, values + start,
                       bias ? bias + query * bias_stride : NULL, weights + place * longest, out + place * size,
                       lengths[token], size, scale);
        }
    }
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
