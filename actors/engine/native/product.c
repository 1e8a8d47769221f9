/* Products of few rows. The sums of a row are added up in the order of `inner`, whatever the rows beside it and whoever
 * computes them, so that its results depend on neither. */
#include "product.h"

#include "team.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

/* Rows of a tile, whose sums fill the registers. */
#if LANES == 16
#define MOST_ROWS 12
#else
#define MOST_ROWS 6
#endif
/* Rows that go through all panels before the next ones do: those of 1024 numbers stay in a cache of 512 KB. */
#define BLOCK 96
/* Rows of a panel that are fetched ahead. With the processor's own prefetching alone, 16 rows times 512 x 8192 take
 * 1.4 times as long on a Zen 3. */
#define AHEAD 24
/* Numbers of a cache line. */
#define LINE 16
/* Multiplications of a part at most: a thread that is left over waits for the others to end one. */
#define PART (8 << 20)

/* The next bytes as numbers. */
static inline vector widened(const signed char *from)
{
#if defined(__AVX512F__)
    return (vector)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
#elif defined(__AVX2__)
    return (vector)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from)));
#else
    lanes found;
    for (int lane = 0; lane < LANES; lane++)
        found.lanes[lane] = from[lane];
    return found.all;
#endif
}

/* Where a tile reads and writes: its first row and column. Meanwhile it fetches what lies `ahead`, every `step` numbers,
 * and `apart` from that. */
struct place {
    const float *x;
    const char *panels;
    const float *scales, *bias;
    float *out;
    ptrdiff_t stride; /* of `out` */
    const float *ahead;
    ptrdiff_t step, apart;
};

/* Makes sums [rows, count vectors] of bytes results. One function for all tiles: a compiler rounds the same lines
 * differently in one place and another. */
#if defined(__clang__)
__attribute__((noinline))
#else
__attribute__((noinline, noclone))
#endif
static void settle(const struct product *p, const struct place *at, const vector *sums, int rows, int count)
{
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < count; v++) {
            unaligned *to = (unaligned *)(at->out + r * at->stride + v * LANES);
            vector found = *sums++ * *(const unaligned *)(at->scales + v * LANES);
            if (at->bias)
                found += *(const unaligned *)(at->bias + v * LANES);
            *to = p->add ? *to + found : found;
        }
}

/* `rows` of x times one panel, or several, of numbers or of bytes. */
static inline __attribute__((always_inline)) void tile(const int rows, const int panels, const int bytes,
                                                       const struct product *p, const struct place *at)
{
    const float *restrict x = at->x, *restrict ahead = at->ahead;
    const float *restrict numbers = (const float *)at->panels;
    const signed char *restrict codes = (const signed char *)at->panels;
    const ptrdiff_t inner = p->inner, x_stride = p->x_stride, step = at->step, apart = at->apart;
    vector sum[MOST_ROWS][8], part[8];
#pragma GCC unroll 8
    for (int v = 0; v < 2 * panels; v++)
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            const vector first = at->bias && !bytes ? *(const unaligned *)(at->bias + v * LANES) : (vector){0};
            sum[r][v] = p->add && !bytes ? first + *(unaligned *)(at->out + r * at->stride + v * LANES) : first;
        }
    for (ptrdiff_t k = 0; k < inner; k++) {
#pragma GCC unroll 8
        for (int v = 0; v < 2 * panels; v++) {
            const ptrdiff_t from = (v / 2 * inner + k) * WIDE + v % 2 * LANES;
            part[v] = bytes ? widened(codes + from) : *(const unaligned *)(numbers + from);
            if (bytes && v % 2 == 0)
                __builtin_prefetch(codes + from + 2 * AHEAD * WIDE);
            if (!bytes && (WIDE == 2 * LINE || v % 2 == 0))
                __builtin_prefetch(ahead + v / 2 * inner * WIDE + k * step + v % 2 * apart);
        }
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            const float value = x[r * x_stride + k];
#pragma GCC unroll 8
            for (int v = 0; v < 2 * panels; v++)
                sum[r][v] += value * part[v];
        }
    }
    vector all[8 * MOST_ROWS];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < 2 * panels; v++)
            if (bytes)
                all[r * 2 * panels + v] = sum[r][v];
            else
                *(unaligned *)(at->out + r * at->stride + v * LANES) = sum[r][v];
    if (bytes)
        settle(p, at, all, rows, 2 * panels);
}

typedef void kernel(const struct product *, const struct place *);

#define TILE(ROWS, PANELS)                                                                                       \
    static __attribute__((noinline)) void tile_##ROWS##_##PANELS(const struct product *p, const struct place *at) \
    {                                                                                                            \
        tile(ROWS, PANELS, 0, p, at);                                                                            \
    }                                                                                                            \
    static __attribute__((noinline)) void bytes_##ROWS##_##PANELS(const struct product *p, const struct place *at) \
    {                                                                                                            \
        tile(ROWS, PANELS, 1, p, at);                                                                            \
    }
TILE(1, 1) TILE(2, 1) TILE(3, 1) TILE(4, 1) TILE(5, 1) TILE(6, 1)
/* With one or two rows, sums of one panel are too few to keep the arithmetic busy. */
TILE(1, 4) TILE(2, 2)
#if MOST_ROWS == 12
TILE(7, 1) TILE(8, 1) TILE(9, 1) TILE(10, 1) TILE(11, 1) TILE(12, 1)
#define ALL(KIND)                                                                                                \
    {KIND##_1_1, KIND##_2_1, KIND##_3_1, KIND##_4_1,  KIND##_5_1,  KIND##_6_1,                                   \
     KIND##_7_1, KIND##_8_1, KIND##_9_1, KIND##_10_1, KIND##_11_1, KIND##_12_1}
#else
#define ALL(KIND) {KIND##_1_1, KIND##_2_1, KIND##_3_1, KIND##_4_1, KIND##_5_1, KIND##_6_1}
#endif
/* Of numbers and of bytes, by rows. */
static kernel *const TILES[2][MOST_ROWS] = {ALL(tile), ALL(bytes)};
static kernel *const WIDE_TILES[2][2] = {{tile_1_4, tile_2_2}, {bytes_1_4, bytes_2_2}};

/* Some rows times one panel, in tiles of like height. */
static void strip(const struct product *p, struct place at, int rows)
{
    const int count = (rows + MOST_ROWS - 1) / MOST_ROWS;
#if LANES == 16
    /* Each tile fetches a part of the next panel, from both its halves: with 16 rows times 2048 x 768 out of memory 1.4
     * times as fast on an Emerald Rapids as AHEAD rows of this one, with 32 rows 1.3 times. */
    at.step = (LINE + count - 1) / count, at.apart = (ptrdiff_t)p->inner * LINE;
    at.ahead = (const float *)at.panels + (ptrdiff_t)p->inner * WIDE;
    const ptrdiff_t further = at.step * p->inner;
#else
    const ptrdiff_t further = 0;
#endif
    for (int tiles = count; tiles > 0; tiles--) {
        const int height = (rows + tiles - 1) / tiles;
        TILES[p->weight.scales != NULL][height - 1](p, &at);
        at.x += height * p->x_stride;
        at.out += height * at.stride;
        at.ahead += further;
        rows -= height;
    }
}

/* The last panel's columns beyond `cols` go to a buffer and no further. */
static void edge(const struct product *p, struct place at, int rows)
{
    float buffer[BLOCK * WIDE] = {0}, *out = at.out;
    const size_t size = p->cols % WIDE * sizeof(float);
    for (int r = 0; p->add && r < rows; r++)
        memcpy(buffer + r * WIDE, out + r * p->out_stride, size);
    at.out = buffer, at.stride = WIDE;
    strip(p, at, rows);
    for (int r = 0; r < rows; r++)
        memcpy(out + r * p->out_stride, buffer + r * WIDE, size);
}

/* Some rows times some panels. */
static void block(const struct product *p, int row, int rows, int panel, int last)
{
    const struct weight *w = &p->weight;
    const ptrdiff_t size = (ptrdiff_t)p->inner * WIDE * (w->scales ? 1 : sizeof(float));
    while (panel < last) {
        const ptrdiff_t column = (ptrdiff_t)panel * WIDE;
        const char *panels = (const char *)w->panels + panel * size;
        const struct place at = {
            p->x + row * p->x_stride, panels, w->scales ? w->scales + column : NULL, w->bias ? w->bias + column : NULL,
            p->out + row * p->out_stride + column, p->out_stride, (const float *)panels + AHEAD * WIDE, WIDE, LINE,
        };
        int count = rows == 1 ? 4 : rows == 2 ? 2 : 1;
        if (count > 1 && panel + count <= last && (panel + count) * WIDE <= p->cols)
            WIDE_TILES[w->scales != NULL][rows - 1](p, &at);
        else if (count = 1, (panel + 1) * WIDE <= p->cols)
            strip(p, at, rows);
        else
            edge(p, at, rows);
        panel += count;
    }
}

int parts_of_product(int rows, int inner, int cols, int threads)
{
    const int panels = (cols + WIDE - 1) / WIDE;
    const long several = 4 * threads, small = (long)rows * inner * cols / PART, wanted = several > small ? several : small;
    return threads == 1 ? 1 : panels < wanted ? panels : wanted;
}

void product_part(const void *product, int part, int seat)
{
    (void)seat;
    const struct product *p = product;
    const long panels = (p->cols + WIDE - 1) / WIDE;
    const int first = panels * part / p->parts, last = panels * (part + 1) / p->parts;
    for (int row = 0; row < p->rows; row += BLOCK)
        block(p, row, p->rows - row < BLOCK ? p->rows - row : BLOCK, first, last);
}

int panel_width(void);
void product(const float *x, const void *panels, const float *scales, const float *bias, float *out, int rows, int inner,
             int cols, int add, int threads);

int panel_width(void) { return WIDE; }

/* See product.h; rows lie one after the other. */
void product(const float *x, const void *panels, const float *scales, const float *bias, float *out, int rows, int inner,
             int cols, int add, int threads)
{
    const int parts = parts_of_product(rows, inner, cols, threads);
    const struct product p = {x, {panels, scales, bias}, out, inner, cols, rows, inner, cols, add, parts};
    struct phase phase = {product_part, &p, parts, 0, 0};
    run_phases(&phase, 1, threads);
}
