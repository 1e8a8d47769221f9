/* One step of a decoder shaped like Llama, from its tokens to their logits: one call, in which the threads go from layer
 * to layer without the interpreter.
 */
#include "attention.h"
#include "product.h"
#include "rowwise.h"
#include "team.h"

#include <stdlib.h>

struct layer {
    struct weight qkv, out, gate_up, down;
    const float *attention_norm, *mlp_norm;
    const float *head_norm; /* of each query and key head, or NULL */
};

struct model {
    const struct layer *layers;
    const float *embedding; /* [vocabulary, hidden], or NULL if it is the head's weight */
    const float *norm;
    struct weight head;
    const float *rotations; /* cosine and sine of each position and pair of dimensions */
    int depth, vocab, hidden, heads, kv_heads, size, inner;
    float epsilon;
};

/* The tokens of a step. */
struct tokens {
    const long *ids, *positions, *rows; /* of the cache */
    const long *lengths;                /* a position more each */
    const long *wanted;                 /* numbers of the tokens whose logits are wanted */
    int count, wanted_count;
};

/* Keys and values, [layer, keys/values, row, kv head, position, size]; strides in numbers. */
struct cache {
    float *all;
    long layer_stride, values, row_stride, head_stride;
};

/* Rows of a buffer lie further apart than they are long, by a cache line: if they are a multiple of 4 KB, those of a
 * tile would drive each other out of the first cache. */
#define APART 16

struct step {
    const struct model *model;
    const struct tokens *tokens;
    const struct cache *cache;
    float *residual, *normed, *qkv, *attended, *gate_up, *inner, *room, *logits;
    long longest;
};

/* One layer's part of a step, and the arguments of its phases. */
struct stage {
    const struct step *step;
    const struct layer *layer;
    float *keys;
    struct product qkv, out, gate_up, down;
    struct attention attention;
};

#define PHASES 9

static long apart(long size) { return size + APART; }

static long width_of_qkv(const struct model *m) { return (long)(m->heads + 2 * m->kv_heads) * m->size; }

static void embed_part(const void *of, int token, int seat)
{
    (void)seat;
    const struct step *s = of;
    const struct model *m = s->model;
    const long id = s->tokens->ids[token];
    float *to = s->residual + token * apart(m->hidden);
    if (m->embedding)
        memcpy(to, m->embedding + id * m->hidden, m->hidden * sizeof(float));
    else {
        const long from = id / WIDE * m->hidden * WIDE + id % WIDE;
        const struct weight *w = &m->head;
        for (long c = 0; c < m->hidden; c++)
            to[c] = w->scales ? w->scales[id] * ((const signed char *)w->panels)[from + c * WIDE]
                              : ((const float *)w->panels)[from + c * WIDE];
    }
}

static void norm_of(const struct step *s, const float *weight, long from, long to)
{
    const struct model *m = s->model;
    rms_norm(s->residual + from * apart(m->hidden), weight, s->normed + to * apart(m->hidden), 1, m->hidden, m->epsilon);
}

static void attention_norm_part(const void *of, int token, int seat)
{
    (void)seat;
    const struct stage *stage = of;
    norm_of(stage->step, stage->layer->attention_norm, token, token);
}

static void mlp_norm_part(const void *of, int token, int seat)
{
    (void)seat;
    const struct stage *stage = of;
    norm_of(stage->step, stage->layer->mlp_norm, token, token);
}

static void last_norm_part(const void *of, int number, int seat)
{
    (void)seat;
    const struct step *s = of;
    norm_of(s, s->model->norm, s->tokens->wanted[number], number);
}

/* Rotates the pairs of a head's dimensions (Su et al. 2021), after its norm if it has one. */
static void turn(float *head, const float *norm, const float *rotation, int size, float epsilon)
{
    if (norm)
        rms_norm(head, norm, head, 1, size, epsilon);
    for (int d = 0; d < size; d += 2) {
        const float real = head[d], imaginary = head[d + 1];
        head[d] = real * rotation[d] - imaginary * rotation[d + 1];
        head[d + 1] = real * rotation[d + 1] + imaginary * rotation[d];
    }
}

/* Rotates a token's queries and keys and puts its keys and values in the cache. */
static void turn_part(const void *of, int token, int seat)
{
    (void)seat;
    const struct stage *stage = of;
    const struct step *s = stage->step;
    const struct model *m = s->model;
    const long position = s->tokens->positions[token], size = m->size;
    float *heads = s->qkv + token * apart(width_of_qkv(m));
    const float *norm = stage->layer->head_norm;
    for (int h = 0; h < m->heads + m->kv_heads; h++)
        turn(heads + h * size, norm ? norm + h * size : NULL, m->rotations + position * size, size, m->epsilon);
    float *row = stage->keys + s->tokens->rows[token] * s->cache->row_stride + position * size;
    const float *keys = heads + m->heads * size, *values = keys + m->kv_heads * size;
    for (int h = 0; h < m->kv_heads; h++, row += s->cache->head_stride) {
        memcpy(row, keys + h * size, size * sizeof(float));
        memcpy(row + s->cache->values, values + h * size, size * sizeof(float));
    }
}

static void gate_part(const void *of, int token, int seat)
{
    (void)seat;
    const struct step *s = ((const struct stage *)of)->step;
    const long inner = s->model->inner;
    const float *gate = s->gate_up + token * apart(2 * inner);
    activate(gate, gate + inner, s->inner + token * apart(inner), 1, inner, 0, 1);
}

static struct product product_of(struct weight weight, const float *x, long x_stride, int inner, float *out,
                                 long out_stride, int cols, int rows, int add, int threads)
{
    return (struct product){
        x, weight, out, x_stride, out_stride, rows, inner, cols, add,
        parts_of_product(rows, inner, cols, threads),
    };
}

static struct phase of_product(const struct product *p) { return (struct phase){product_part, p, p->parts, 0, 0}; }

/* The phases of one layer. */
static void plan_layer(struct stage *stage, struct phase *phases, int *first, int threads)
{
    const struct step *s = stage->step;
    const struct model *m = s->model;
    const struct layer *l = stage->layer;
    const struct tokens *t = s->tokens;
    const long hidden = apart(m->hidden), qkv = apart(width_of_qkv(m)), heads = (long)m->heads * m->size;
    const int n = t->count;
    stage->qkv = product_of(l->qkv, s->normed, hidden, m->hidden, s->qkv, qkv, width_of_qkv(m), n, 0, threads);
    stage->out = product_of(l->out, s->attended, apart(heads), heads, s->residual, hidden, m->hidden, n, 1, threads);
    stage->gate_up = product_of(l->gate_up, s->normed, hidden, m->hidden, s->gate_up, apart(2 * m->inner), 2 * m->inner,
                                n, 0, threads);
    stage->down = product_of(l->down, s->inner, apart(m->inner), m->inner, s->residual, hidden, m->hidden, n, 1, threads);
    stage->attention = (struct attention){
        s->qkv, stage->keys, stage->keys + s->cache->values, NULL, s->room, s->attended, t->rows, t->lengths,
        s->longest, qkv, apart(heads), s->cache->row_stride, s->cache->head_stride, 0, n, m->kv_heads,
        m->heads / m->kv_heads, m->size, 1, first, 0,
    };
    const int attention_parts = plan_attention(&stage->attention);
    phases[0] = (struct phase){attention_norm_part, stage, n, 0, 0};
    phases[1] = of_product(&stage->qkv);
    phases[2] = (struct phase){turn_part, stage, n, 0, 0};
    phases[3] = (struct phase){attention_part, &stage->attention, attention_parts, 0, 0};
    phases[4] = of_product(&stage->out);
    phases[5] = (struct phase){mlp_norm_part, stage, n, 0, 0};
    phases[6] = of_product(&stage->gate_up);
    phases[7] = (struct phase){gate_part, stage, n, 0, 0};
    phases[8] = of_product(&stage->down);
}

long llama_room(const struct model *m, int tokens, long longest, int threads);
int llama_step(const struct model *m, const struct tokens *tokens, const struct cache *cache, long longest, float *room,
               float *logits, int threads);

/* Numbers that a step needs room for. */
long llama_room(const struct model *m, int tokens, long longest, int threads)
{
    const long row = 2 * apart(m->hidden) + apart(width_of_qkv(m)) + apart((long)m->heads * m->size)
                     + apart(2 * m->inner) + apart(m->inner);
    return tokens * row + threads * attention_room(longest);
}

/* Runs a step's tokens, those of a row of the cache in order and side by side, and stores their keys and values; `logits`
 * becomes [wanted, vocabulary]. Not 0: there was no memory, and nothing has been done. */
int llama_step(const struct model *m, const struct tokens *tokens, const struct cache *cache, long longest, float *room,
               float *logits, int threads)
{
    const long n = tokens->count;
    struct step s = {.model = m, .tokens = tokens, .cache = cache, .logits = logits, .longest = longest};
    s.residual = room;
    s.normed = s.residual + n * apart(m->hidden);
    s.qkv = s.normed + n * apart(m->hidden);
    s.attended = s.qkv + n * apart(width_of_qkv(m));
    s.gate_up = s.attended + n * apart((long)m->heads * m->size);
    s.inner = s.gate_up + n * apart(2 * m->inner);
    s.room = s.inner + n * apart(m->inner);
    struct stage *stages = malloc(m->depth * sizeof *stages);
    struct phase *phases = malloc((m->depth * PHASES + 3) * sizeof *phases);
    int *first = malloc((n + 1) * sizeof *first);
    const int ready = stages && phases && first;
    if (ready) {
        phases[0] = (struct phase){embed_part, &s, n, 0, 0};
        for (int layer = 0; layer < m->depth; layer++) {
            stages[layer] = (struct stage){.step = &s, .layer = m->layers + layer};
            stages[layer].keys = cache->all + layer * cache->layer_stride;
            plan_layer(stages + layer, phases + 1 + layer * PHASES, first, threads);
        }
        struct phase *last = phases + 1 + m->depth * PHASES;
        const struct product head = product_of(m->head, s.normed, apart(m->hidden), m->hidden, logits, m->vocab, m->vocab,
                                               tokens->wanted_count, 0, threads);
        last[0] = (struct phase){last_norm_part, &s, tokens->wanted_count, 0, 0};
        last[1] = of_product(&head);
        run_phases(phases, m->depth * PHASES + 3, threads);
    }
    free(first), free(phases), free(stages);
    return !ready;
}
