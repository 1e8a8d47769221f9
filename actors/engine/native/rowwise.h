/* What is computed for each row by itself. */
#ifndef ROWWISE_H
#define ROWWISE_H

void rms_norm(const float *x, const float *weight, float *out, int rows, int size, float epsilon);
void layer_norm(const float *x, const float *weight, const float *bias, float *out, int rows, int size, float epsilon);
void activate(const float *gate, const float *up, float *out, long rows, int size, long stride, int kind);
void store(const float *vectors, float *cache, const long *addresses, long stride, int count, int heads, int size);

#endif
