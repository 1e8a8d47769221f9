/* Attention of single tokens over the rows of a cache. */
#ifndef ATTENTION_H
#define ATTENTION_H

/* Queries and `out` are [count, kv heads * group, size]; keys and values [row, kv head, position, size], in which each
 * token sees the first `lengths` positions of its row. Tokens of the same row that follow each other attend together:
 * of these, a longer one's positions must hold numbers. Made whole by `plan_attention`. */
struct attention {
    const float *queries, *keys, *values;
    const float *bias; /* by head and distance from the token's own position; unless NULL, added to a score */
    float *room, *out; /* `attention_room` numbers for each thread */
    const long *rows, *lengths;
    long longest; /* of `lengths` */
    long stride, out_stride, row_stride, head_stride, bias_stride;
    int count, kv_heads, group, size;
    float scale;
    int *first; /* of each group of tokens that attend together, [count + 1] */
    int groups;
};

/* Numbers that each thread needs room for. */
long attention_room(long longest);
/* Fills `first` and `groups`; returns the parts. */
int plan_attention(struct attention *attention);
void attention_part(const void *attention, int part, int seat);

#endif
