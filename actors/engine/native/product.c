/* Products of few rows. The sums of a row are added up in the order of `inner`, whatever the rows beside it and whoever
 * computes them, so that its results depend on neither. */
#include "product.h"

#include "team.h"

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

/* `rows` of x times one panel, or several; meanwhile it fetches what lies `ahead`, every `step` numbers, and `apart` from
 * that. */
static inline __attribute__((always_inline)) void tile(
    const int rows, const int panels, const float *restrict x, ptrdiff_t x_stride, const float *restrict weight,
    const float *restrict bias, float *restrict out, ptrdiff_t stride, ptrdiff_t inner, int add, const float *ahead,
    ptrdiff_t step, ptrdiff_t apart)
{
    vector sum[MOST_ROWS][8], part[8];
#pragma GCC unroll 8
    for (int v = 0; v < 2 * panels; v++) {
        const vector first = bias ? *(const unaligned *)(bias + v * LANES) : (vector){0};
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++)
            sum[r][v] = add ? first + *(const unaligned *)(out + r * stride + v * LANES) : first;
    }
    for (ptrdiff_t k = 0; k < inner; k++) {
#pragma GCC unroll 8
        for (int v = 0; v < 2 * panels; v++) {
            const float *from = weight + (v / 2 * inner + k) * WIDE + v % 2 * LANES;
            part[v] = *(const unaligned *)from;
            if (WIDE == 2 * LINE || v % 2 == 0)
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
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < 2 * panels; v++)
            *(unaligned *)(out + r * stride + v * LANES) = sum[r][v];
}

typedef void kernel(const float *, ptrdiff_t, const float *, const float *, float *, ptrdiff_t, ptrdiff_t, int,
                    const float *, ptrdiff_t, ptrdiff_t);

#define TILE(ROWS, PANELS)                                                                                       \
    static __attribute__((noinline)) void tile_##ROWS##_##PANELS(                                                \
        const float *x, ptrdiff_t x_stride, const float *weight, const float *bias, float *out,                  \
        ptrdiff_t stride, ptrdiff_t inner, int add, const float *ahead, ptrdiff_t step, ptrdiff_t apart)         \
    {                                                                                                            \
        tile(ROWS, PANELS, x, x_stride, weight, bias, out, stride, inner, add, ahead, step, apart);              \
    }
TILE(1, 1) TILE(2, 1) TILE(3, 1) TILE(4, 1) TILE(5, 1) TILE(6, 1)
/* With one or two rows, sums of one panel are too few to keep the arithmetic busy. */
TILE(1, 4) TILE(2, 2)
#if MOST_ROWS == 12
TILE(7, 1) TILE(8, 1) TILE(9, 1) TILE(10, 1) TILE(11, 1) TILE(12, 1)
static kernel *const TILES[] = {tile_1_1, tile_2_1, tile_3_1, tile_4_1,  tile_5_1,  tile_6_1,
                                tile_7_1, tile_8_1, tile_9_1, tile_10_1, tile_11_1, tile_12_1};
#else
static kernel *const TILES[] = {tile_1_1, tile_2_1, tile_3_1, tile_4_1, tile_5_1, tile_6_1};
#endif

/* Some rows times one panel, in tiles of like height. */
static void strip(const struct product *p, const float *x, const float *weight, const float *bias, float *out,
                  ptrdiff_t stride, int rows)
{
    const int count = (rows + MOST_ROWS - 1) / MOST_ROWS;
    for (int tiles = count; tiles > 0; tiles--) {
        const int height = (rows + tiles - 1) / tiles;
#if LANES == 16
        /* Each tile fetches a part of the next panel, from both its halves: with 16 rows times 2048 x 768 out of memory
         * 1.4 times as fast on an Emerald Rapids as AHEAD rows of this one, with 32 rows 1.3 times. */
        const ptrdiff_t step = (LINE + count - 1) / count, apart = p->inner * LINE;
        const float *ahead = weight + p->inner * WIDE + (count - tiles) * step * p->inner;
#else
        const ptrdiff_t step = WIDE, apart = 0;
        const float *ahead = weight + AHEAD * WIDE;
#endif
        TILES[height - 1](x, p->x_stride, weight, bias, out, stride, p->inner, p->add, ahead, step, apart);
        x += height * p->x_stride;
        out += height * stride;
        rows -= height;
    }
}

/* The last panel's columns beyond `cols` go to a buffer and no further. */
static void edge(const struct product *p, const float *x, const float *weight, const float *bias, float *out, int rows)
{
    float buffer[BLOCK * WIDE] = {0};
    const size_t size = p->cols % WIDE * sizeof(float);
    for (int r = 0; p->add && r < rows; r++)
        memcpy(buffer + r * WIDE, out + r * p->out_stride, size);
    strip(p, x, weight, bias, buffer, WIDE, rows);
    for (int r = 0; r < rows; r++)
        memcpy(out + r * p->out_stride, buffer + r * WIDE, size);
}

/* Some rows times some panels. */
static void block(const struct product *p, int row, int rows, int panel, int last)
{
    const float *x = p->x + row * p->x_stride;
    while (panel < last) {
        const float *from = p->weight + (ptrdiff_t)panel * p->inner * WIDE;
        const float *offset = p->bias ? p->bias + panel * WIDE : NULL;
        float *to = p->out + row * p->out_stride + panel * WIDE;
        int panels = 1;
        if (rows == 1 && (panel + 4) * WIDE <= p->cols && panel + 4 <= last)
            tile_1_4(x, p->x_stride, from, offset, to, p->out_stride, p->inner, p->add, from + AHEAD * WIDE, WIDE, LINE), panels = 4;
        else if (rows == 2 && (panel + 2) * WIDE <= p->cols && panel + 2 <= last)
            tile_2_2(x, p->x_stride, from, offset, to, p->out_stride, p->inner, p->add, from + AHEAD * WIDE, WIDE, LINE), panels = 2;
        else if ((panel + 1) * WIDE <= p->cols)
            strip(p, x, from, offset, to, p->out_stride, rows);
        else
            edge(p, x, from, offset, to, rows);
        panel += panels;
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
void product(const float *x, const float *weight, const float *bias, float *out, int rows, int inner, int cols, int add,
             int threads);

int panel_width(void) { return WIDE; }

/* See product.h; rows lie one after the other. */
void product(const float *x, const float *weight, const float *bias, float *out, int rows, int inner, int cols, int add,
             int threads)
{
    const int parts = parts_of_product(rows, inner, cols, threads);
    const struct product p = {x, weight, bias, out, inner, cols, rows, inner, cols, add, parts};
    struct phase phase = {product_part, &p, parts, 0, 0};
    run_phases(&phase, 1, threads);
}
