/* Attention. The results of a query do not depend on those that it attends together with. */
#include "attention.h"

#include "team.h"
#include "vectors.h"

/* Tokens that attend together: their keys and values are read once for all. */
#define TOGETHER 16
/* Queries of a tile. */
#define QUERIES 4

/* Numbers of a cache line. */
#define LINE 16

#if LANES == 16
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#else
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define ODD 1, 3, 5, 7, 9, 11, 13, 15
#endif

/* The sums of LANES vectors' numbers, in order. */
static inline vector sums_of(vector *parts)
{
#pragma GCC unroll 4
    for (int left = LANES / 2; left > 0; left /= 2)
#pragma GCC unroll 8
        for (int n = 0; n < left; n++)
            parts[n] = __builtin_shufflevector(parts[2 * n], parts[2 * n + 1], EVEN)
                       + __builtin_shufflevector(parts[2 * n], parts[2 * n + 1], ODD);
    return parts[0];
}

/* Products of some queries with LANES / queries keys, query by query. Keys beyond `left` are the last one again. */
static inline __attribute__((always_inline)) vector dots(const int queries, const float *const *query,
                                                         const float *keys, long left, int size)
{
    const int count = LANES / queries;
    vector sums[LANES] = {0};
    const float *key[LANES];
#pragma GCC unroll 16
    for (int k = 0; k < count; k++)
        key[k] = keys + (k < left ? k : left - 1) * size;
    int d = 0;
    for (; d + LANES <= size; d += LANES) {
        vector part[QUERIES];
#pragma GCC unroll 4
        for (int q = 0; q < queries; q++)
            part[q] = *(const unaligned *)(query[q] + d);
#pragma GCC unroll 16
        for (int k = 0; k < count; k++) {
            const vector of_key = *(const unaligned *)(key[k] + d);
#pragma GCC unroll 4
            for (int q = 0; q < queries; q++)
                sums[q * count + k] += part[q] * of_key;
        }
    }
    if (d < size) {
#pragma GCC unroll 16
        for (int k = 0; k < count; k++)
#pragma GCC unroll 4
            for (int q = 0; q < queries; q++)
                sums[q * count + k] += next(query[q] + d, size - d, 0) * next(key[k] + d, size - d, 0);
    }
    return sums_of(sums);
}

/* Scores of some queries with the first `length` keys; a query's lie `longest` apart. */
static inline __attribute__((always_inline)) void scores(const int queries, const float *const *query,
                                                         const float *keys, const float *values, float *room,
                                                         long longest, long length, int size, float scale)
{
    const int count = LANES / queries;
    for (long l = 0; l < length; l += count) {
        /* The next keys, and the values that these keys' scores are for. */
        for (long ahead = l * size; ahead < (l + count) * size; ahead += LINE) {
            __builtin_prefetch(keys + count * size + ahead);
            __builtin_prefetch(values + ahead);
        }
        const lanes found = {dots(queries, query, keys + l * size, length - l, size) * scale};
        const long used = length - l < count ? length - l : count;
#pragma GCC unroll 4
        for (int q = 0; q < queries; q++)
            memcpy(room + q * longest + l, found.lanes + q * count, used * sizeof(float));
    }
}

/* Makes scores of the first `length` positions weights, and of those up to `end` 0; the sum of the former, which is no
 * number if one of the scores is none. */
static float weigh(float *weights, const float *bias, long length, long end)
{
    for (long l = 0; bias && l < length; l++)
        weights[l] += bias[length - 1 - l];
    lanes most = {(vector){0} - INFINITY};
    for (long l = 0; l < length; l += LANES) {
        const vector found = next(weights + l, length - l, -INFINITY);
        const whole more = found > most.all;
        most.all = (vector)(((whole)found & more) | ((whole)most.all & ~more));
    }
    float highest = -INFINITY;
    for (int lane = 0; lane < LANES; lane++)
        highest = most.lanes[lane] > highest ? most.lanes[lane] : highest;
    lanes sums = {{0}};
    for (long l = 0; l < length; l += LANES) {
        const vector found = exp_of(next(weights + l, length - l, -INFINITY) - highest);
        put(weights + l, length - l, found);
        sums.all += found;
    }
    for (long l = length; l < end; l++)
        weights[l] = 0;
    return sum_of(sums);
}

/* What some queries get from the first `length` values. */
static inline __attribute__((always_inline)) void mix(const int queries, const float *room, const float *totals,
                                                      long longest, const float *values, float *const *out,
                                                      long length, int size)
{
    int d = 0;
    for (; d + 4 * LANES <= size; d += 4 * LANES) {
        vector sums[QUERIES][4] = {0};
        for (long l = 0; l < length; l++)
#pragma GCC unroll 4
            for (int v = 0; v < 4; v++) {
                const vector value = *(const unaligned *)(values + l * size + d + v * LANES);
#pragma GCC unroll 4
                for (int q = 0; q < queries; q++)
                    sums[q][v] += room[q * longest + l] * value;
            }
        for (int q = 0; q < queries; q++)
            for (int v = 0; v < 4; v++)
                *(unaligned *)(out[q] + d + v * LANES) = sums[q][v] / totals[q];
    }
    for (; d < size; d += LANES)
        for (int q = 0; q < queries; q++) {
            vector sum = {0};
            for (long l = 0; l < length; l++)
                sum += room[q * longest + l] * next(values + l * size + d, size - d, 0);
            put(out[q] + d, size - d, sum / totals[q]);
        }
}

/* Some queries, by number within their group of tokens, over the keys and values of their head. */
static inline __attribute__((always_inline)) void attend_queries(const int queries, const struct attention *a,
                                                                 long first, long number, long head, float *room)
{
    const float *query[QUERIES], *bias[QUERIES];
    float *out[QUERIES], totals[QUERIES];
    long lengths[QUERIES], end = 0;
    for (int q = 0; q < queries; q++) {
        const long token = first + (number + q) / a->group, of = head * a->group + (number + q) % a->group;
        query[q] = a->queries + token * a->stride + of * a->size;
        out[q] = a->out + token * a->out_stride + of * a->size;
        bias[q] = a->bias ? a->bias + of * a->bias_stride : NULL;
        lengths[q] = a->lengths[token];
        end = lengths[q] > end ? lengths[q] : end;
    }
    const long start = a->rows[first] * a->row_stride + head * a->head_stride;
    scores(queries, query, a->keys + start, a->values + start, room, a->longest, end, a->size, a->scale);
    for (int q = 0; q < queries; q++)
        totals[q] = weigh(room + q * a->longest, bias[q], lengths[q], end);
    mix(queries, room, totals, a->longest, a->values + start, out, end, a->size);
}

static __attribute__((noinline)) void attend_one(const struct attention *a, long first, long number, long head, float *room)
{
    attend_queries(1, a, first, number, head, room);
}

static __attribute__((noinline)) void attend_some(const struct attention *a, long first, long number, long head, float *room)
{
    attend_queries(QUERIES, a, first, number, head, room);
}

long attention_room(long longest)
{
    return QUERIES * longest;
}

int plan_attention(struct attention *a)
{
    a->groups = 0;
    for (int n = 0; n < a->count; n++)
        if (n == 0 || a->rows[n] != a->rows[n - 1] || n - a->first[a->groups - 1] == TOGETHER)
            a->first[a->groups++] = n;
    a->first[a->groups] = a->count;
    return a->groups * a->kv_heads;
}

void attention_part(const void *attention, int part, int seat)
{
    const struct attention *a = attention;
    const int group = part / a->kv_heads, head = part % a->kv_heads, first = a->first[group];
    const int queries = (a->first[group + 1] - first) * a->group;
    float *room = a->room + seat * attention_room(a->longest);
    int done = 0;
    for (; done + QUERIES <= queries; done += QUERIES)
        attend_some(a, first, done, head, room);
    for (; done < queries; done++)
        attend_one(a, first, done, head, room);
}

void attend(const float *queries, const float *keys, const float *values, const float *bias, float *room, float *out,
            const long *rows, const long *lengths, int *first, long longest, long stride, long row_stride,
            long head_stride, long bias_stride, int count, int kv_heads, int group, int size, float scale, int threads);

/* See attention.h; `room` is for all threads, `first` has room for `count` + 1 numbers. */
void attend(const float *queries, const float *keys, const float *values, const float *bias, float *room, float *out,
            const long *rows, const long *lengths, int *first, long longest, long stride, long row_stride,
            long head_stride, long bias_stride, int count, int kv_heads, int group, int size, float scale, int threads)
{
    struct attention a = {
        queries, keys, values, bias, room, out, rows, lengths, longest, stride, (long)kv_heads * group * size, row_stride,
        head_stride, bias_stride, count, kv_heads, group, size, scale, first, 0,
    };
    struct phase phase = {attention_part, &a, 0, 0, 0};
    phase.parts = plan_attention(&a);
    run_phases(&phase, 1, threads);
}
