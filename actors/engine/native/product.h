/* Rows times a weight. */
#ifndef PRODUCT_H
#define PRODUCT_H
#include <stddef.h>

#include "vectors.h"

/* Columns that lie side by side in a weight: it consists of panels of so many columns, each one row of the panel after
 * the other, so that it is read in the order in which it lies in memory. */
#define WIDE (2 * LANES)

/* Columns up to a multiple of the panel's. */
struct weight {
    const void *panels;  /* fp32, or with scales signed bytes */
    const float *scales; /* what each column's bytes are to be multiplied by, or NULL */
    const float *bias;   /* or NULL */
};

/* out [rows, cols] = x [rows, inner] * weight plus bias, or with `add` that added to what `out` holds. Strides are from
 * row to row. */
struct product {
    const float *x;
    struct weight weight;
    float *out;
    ptrdiff_t x_stride, out_stride;
    int rows, inner, cols, add;
    int parts; /* what `parts_of_product` says */
};

int parts_of_product(int rows, int inner, int cols, int threads);
void product_part(const void *product, int part, int seat);

#endif
