/* The whole forward pass of a decoder: tokens of any rows of a KV cache in, logits out.
 *
 * One call runs prompts, single tokens of many conversations and guesses alike; all tokens go
 * through each product together, so the weights are read once. What a token's logits are depends on
 * nothing but the tokens before it: never on how they were cut into calls or what ran beside them.
 *
 * Keys and values lie in blocks of 64 positions, for each row, head and block: keys as [H][64],
 * values as [64][H]. A layer with a window keeps a ring of blocks. The structs are filled in by
 * engine/kernels/decoder.py, which also checks every size before the call.
 */

#include "matrix.h"

#ifdef _OPENMP
#include <omp.h>
static int thread(void) { return omp_get_thread_num(); }
static int team(void) { return omp_get_num_threads(); }
#else
static int thread(void) { return 0; }
static int team(void) { return 1; }
#endif

enum { BLOCK = 64, VECS = BLOCK / LANES, TILE = 16 };       /* TILE: queries that share a key */
enum { PANELS = GROUP / PANEL, MLP_TOKENS = 64, TALL = 4 }; /* of what one piece of work takes */
enum { FEW = 8 };
enum { SWIGLU, GEGLU, GEGLU_TANH, GELU, GELU_TANH, RELU2 };
static const float NEVER = -1e30f;  /* the score of a key that may not be seen */

typedef struct {
    const float *weight, *bias;  /* weight NULL: no norm here */
} norm;

typedef struct {
    norm attention_in, attention_out, mlp_in, mlp_out, query, key;
    matrix q, k, v, o, gate, up, down;  /* gate.data NULL: an MLP without a gate */
    int64_t window, rotation;           /* 0: sees all; -1: knows no positions */
} layer;

typedef struct {
    int64_t D, L, N, K, H, F, V, rotary, activation, centred, whole;
    float eps, scale, softcap, logit_cap, embedding_scale;
    const layer *layers;
    matrix embedding, head, positions;  /* positions.data NULL: none are learned */
    norm final;
} model;

typedef struct {
    int64_t format;  /* PLAIN32, PLAIN16 or BYTES, these with a scale for each position */
    const float *cosine[2], *sine[2];  /* (positions, rotary / 2) */
    char **keys, **values;             /* one buffer a layer */
    float **key_scales, **value_scales;
    const int64_t *blocks;  /* how many blocks a row has, in each layer */
} cache;

typedef struct {
    int64_t many, wanted;
    const int32_t *token, *position, *row;
    const int32_t *which;  /* the tokens whose logits are wanted */
} batch;

typedef struct {
    long first, many;  /* tokens of one row, positions in order */
} tile;

/* Few tokens are cheaper to normalise in every thread, on a copy of its own, than to wait for. */
typedef struct {
    int alone;
    float *x;   /* the residual stream */
    tokens in;  /* of it, what the next product reads */
    float *out, *q, *k, *v;
    tokens mixed, wide, last;
    tile *tiles;
    long tile_count;
    float *scratch;  /* one piece a thread */
    long scratch_size;
} workspace;

static long scratch_size(const model *m) {
    long rows = TILE * (m->N / m->K), wide = up(m->H, LANES) * LANES;
    return rows * (BLOCK + wide + 2) + 2 * BLOCK * wide;
}

static char *take(char **from, size_t bytes) {
    char *here = *from;
    *from += up(bytes, 64) * 64;
    return here;
}

static void take_tokens(char **from, tokens *x, long many, long width) {
    x->width = up(width, GROUP) * GROUP;
    x->plain = (float *)take(from, many * x->width * sizeof(float));
    x->bytes = (int8_t *)take(from, many * x->width);
    x->scale = (float *)take(from, many * x->width / HALF * sizeof(float));
    x->sums = (int32_t *)take(from, many * x->width / HALF * sizeof(int32_t));
}

/* Lay out the workspace from `from` on, which may be NULL to learn its size, as a thread sees it. */
static size_t lay_out(const model *m, long many, int threads, int thread, int alone, char *from,
                      workspace *w) {
    char *begin = from;
    long D = up(m->D, GROUP) * GROUP;
    w->alone = alone;
    for (int i = -1; i < threads; i++) {  /* one for all, then one for each */
        tokens in;
        long room = i < 0 ? many : FEW;
        take_tokens(&from, &in, room, m->D);
        float *x = (float *)take(&from, room * D * sizeof(float));
        if (i == (alone ? thread : -1)) w->in = in, w->x = x;
    }
    take_tokens(&from, &w->mixed, many, m->N * m->H);
    take_tokens(&from, &w->wide, many, m->F);
    take_tokens(&from, &w->last, many, m->D);
    w->out = (float *)take(&from, many * D * sizeof(float));
    w->q = (float *)take(&from, many * m->N * m->H * sizeof(float));
    w->k = (float *)take(&from, many * m->K * m->H * sizeof(float));
    w->v = (float *)take(&from, many * m->K * m->H * sizeof(float));
    for (int i = 0; i < threads; i++) {
        tile *tiles = (tile *)take(&from, many * sizeof(tile));
        if (i == thread) w->tiles = tiles;
    }
    w->scratch_size = scratch_size(m);
    w->scratch = (float *)take(&from, threads * w->scratch_size * sizeof(float));
    return from - begin;
}

size_t workspace_bytes(const model *m, int64_t many, int threads) {
    workspace w;
    return lay_out(m, many, threads, 0, 0, NULL, &w);
}

/* y = x / rms(x) · weight, or (x - mean) / std · weight + bias; n numbers, y may be x. */
static void normalise(const model *m, const norm *by, const float *x, long n, float *y) {
    vec total = all(0), squares = all(0);
    float mean = 0;
    if (m->centred) {
        for (long i = 0; i < n; i += LANES) total += load_some(x + i, n - i);
        mean = sum(total) / n;
    }
    for (long i = 0; i < n; i += LANES) {
        vec v = only(load_some(x + i, n - i) - mean, n - i);
        squares += v * v;
    }
    float r = 1 / sqrtf(sum(squares) / n + m->eps);
    for (long i = 0; i < n; i += LANES) {
        vec v = (load_some(x + i, n - i) - mean) * r * load_some(by->weight + i, n - i);
        if (by->bias) v += load_some(by->bias + i, n - i);
        store_some(y + i, v, n - i);
    }
}

/* Turn the pairs (i, i + rotary / 2) of a head by its position's angles. */
static void rotate(float *x, const float *cosine, const float *sine, long pairs) {
    for (long i = 0; i < pairs; i += LANES) {
        vec a = load_some(x + i, pairs - i), b = load_some(x + pairs + i, pairs - i);
        vec c = load_some(cosine + i, pairs - i), s = load_some(sine + i, pairs - i);
        vec turned = a * c - b * s, other = b * c + a * s;
        store_some(x + i, turned, pairs - i);
        store_some(x + pairs + i, other, pairs - i);
    }
}

static long number_bytes(int64_t format) { return format == PLAIN32 ? 4 : format == PLAIN16 ? 2 : 1; }

/* Where the block of a position begins, counted in blocks. */
static long block_at(const model *m, const cache *c, long l, long row, long head, long block) {
    return (row * m->K + head) * c->blocks[l] + block % c->blocks[l];
}

/* Store H numbers `stride` apart in the cache's format. */
static void keep(int64_t format, const float *x, long H, char *to, long stride, float *scale) {
    float top = 0;
    if (format == BYTES) {
        for (long h = 0; h < H; h++) top = fabsf(x[h]) > top ? fabsf(x[h]) : top;
        *scale = top / 127;
    }
    float inverse = top > 0 ? 127 / top : 0;
    for (long h = 0; h < H; h++) {
        if (format == PLAIN32) ((float *)to)[h * stride] = x[h];
        else if (format == PLAIN16) ((uint16_t *)to)[h * stride] = to_half(x[h]);
        else ((int8_t *)to)[h * stride] = (int8_t)lrintf(x[h] * inverse);
    }
}

/* Finish a head of keys of a token, with its queries: norms, rotation, and into the cache. */
static void finish_head(const model *m, const cache *c, const batch *b, const workspace *w, long l,
                        long t, long head) {
    const layer *at = m->layers + l;
    long H = m->H, group = m->N / m->K, p = b->position[t], size = number_bytes(c->format);
    float *q = w->q + (t * m->N + head * group) * H, *k = w->k + (t * m->K + head) * H;
    for (long n = 0; n <= group; n++) {
        float *x = n < group ? q + n * H : k;
        if (at->query.weight && !m->whole) normalise(m, n < group ? &at->query : &at->key, x, H, x);
        if (at->rotation >= 0) {
            long pairs = m->rotary / 2, from = p * pairs;
            rotate(x, c->cosine[at->rotation] + from, c->sine[at->rotation] + from, pairs);
        }
    }
    long block = block_at(m, c, l, b->row[t], head, p / BLOCK), i = p % BLOCK;
    char *keys = c->keys[l] + (block * BLOCK * H + i) * size;
    char *values = c->values[l] + (block * BLOCK + i) * H * size;
    long scale = c->format == BYTES ? block * BLOCK + i : 0;
    keep(c->format, k, H, keys, BLOCK, c->key_scales[l] + scale);
    keep(c->format, w->v + (t * m->K + head) * H, H, values, 1, c->value_scales[l] + scale);
}

/* The norm that some models put over all heads at once. */
static void normalise_heads(const model *m, const layer *at, const workspace *w, long t) {
    float *q = w->q + t * m->N * m->H, *k = w->k + t * m->K * m->H;
    normalise(m, &at->query, q, m->N * m->H, q);
    normalise(m, &at->key, k, m->K * m->H, k);
}

INLINE vec load_kept(int64_t format, const char *at) {
    narrow n;
    if (format == PLAIN32) return load((const float *)at);
    if (format == PLAIN16) return load_half((const uint16_t *)at);
    memcpy(&n, at, sizeof n);
    return __builtin_convertvector(n, vec);
}

/* A block as fp32: keys [H][64], values [64][wide], zeros beyond H. */
static void widen(const model *m, const cache *c, long l, long block, float *keys, float *values,
                  long wide) {
    long H = m->H, size = number_bytes(c->format);
    const char *from = c->keys[l] + block * BLOCK * H * size;
    vec by[VECS];
    EACH(i, VECS)
        by[i] = c->format == BYTES ? load(c->key_scales[l] + block * BLOCK + i * LANES) : all(1);
    for (long h = 0; h < H; h++)
        EACH(i, VECS) {
            long at = h * BLOCK + i * LANES;
            store(keys + at, load_kept(c->format, from + at * size) * by[i]);
        }
    from = c->values[l] + block * BLOCK * H * size;
    for (long s = 0; s < BLOCK; s++) {
        float scale = c->format == BYTES ? c->value_scales[l][block * BLOCK + s] : 1;
        for (long h = 0; h < wide; h += LANES) {
            const char *at = from + (s * H + h) * size;
            char rest[LANES * 4] = {0};
            if (h + LANES > H) {
                memcpy(rest, at, h < H ? (H - h) * size : 0);
                at = rest;
            }
            store(values + s * wide + h, load_kept(c->format, at) * scale);
        }
    }
}

/* The queries of a tile that read one head of keys: `group` heads of each of its tokens. */
typedef struct {
    const float *q;
    long heads, group;
} query;

/* Scores of R queries, from the r-th on, and the 64 keys of a block. */
INLINE void score(const int R, const query *at, long r, const float *keys, long H, float *scores) {
    const float *q[TALL];
    EACH(i, R) q[i] = at->q + ((r + i) / at->group * at->heads + (r + i) % at->group) * H;
    vec acc[TALL][VECS];
    EACH(r, R)
        EACH(i, VECS) acc[r][i] = all(0);
    for (long h = 0; h < H; h++)
        EACH(r, R) {
            vec x = all(q[r][h]);
            EACH(i, VECS) acc[r][i] += x * load(keys + h * BLOCK + i * LANES);
        }
    EACH(r, R)
        EACH(i, VECS) store(scores + r * BLOCK + i * LANES, acc[r][i]);
}

/* Add the values of a block to R outputs, weighted: W · 16 columns from h on. */
INLINE void gather_columns(const int R, const int W, const float *weights, const float *values,
                           long wide, long h, float *to) {
    vec acc[TALL][4];
    EACH(r, R)
        EACH(i, W) acc[r][i] = load(to + r * wide + h + i * LANES);
    for (long s = 0; s < BLOCK; s++) {
        vec v[4];
        EACH(i, W) v[i] = load(values + s * wide + h + i * LANES);
        EACH(r, R) {
            vec x = all(weights[r * BLOCK + s]);
            EACH(i, W) acc[r][i] += x * v[i];
        }
    }
    EACH(r, R)
        EACH(i, W) store(to + r * wide + h + i * LANES, acc[r][i]);
}

INLINE void gather(const int R, const float *weights, const float *values, long wide, float *to) {
    long h = 0;
    for (; h + 4 * LANES <= wide; h += 4 * LANES)
        gather_columns(R, 4, weights, values, wide, h, to);
    for (; h < wide; h += LANES) gather_columns(R, 1, weights, values, wide, h, to);
}

/* Turn a query's scores into weights, and shrink what it has gathered so far to their measure. */
static void weigh(const model *m, long window, long position, long block, float *scores, float *most,
                  float *total, float *gathered, long wide) {
    vec s[VECS], top = all(*most);
    ivec seen[VECS];
    long distance = position - block * BLOCK;
    int all_seen = distance >= BLOCK - 1 && (!window || distance < window);
    EACH(i, VECS) {
        s[i] = load(scores + i * LANES) * m->scale;
        if (m->softcap) s[i] = m->softcap * hyperbolic(s[i] / m->softcap);
        if (!all_seen) {
            ivec far = (int32_t)(distance - i * LANES) - LANE;
            seen[i] = far >= 0;
            if (window) seen[i] &= far < (int32_t)window;
            s[i] = choose(seen[i], s[i], all(NEVER));
        }
        top = greater(top, s[i]);
    }
    float now = largest(top), less = now > *most ? exponential(all(*most - now))[0] : 1;
    vec sums = all(0);
    EACH(i, VECS) {
        vec weight = exponential(s[i] - now);
        if (!all_seen) weight = choose(seen[i], weight, all(0));
        store(scores + i * LANES, weight);
        sums += weight;
    }
    *total = *total * less + sum(sums);
    *most = now;
    if (less < 1)
        for (long h = 0; h < wide; h += LANES) store(gathered + h, load(gathered + h) * less);
}

/* Whether what a head of keys has gathered makes whole groups, to be rounded at once. */
static int rounds_heads(const model *m, const layer *at) {
    return !is_plain(&at->o) && m->N / m->K * m->H % GROUP == 0;
}

/* Attention of a tile of queries over one head of keys, block by block (Dao et al. 2022). */
static void attend(const model *m, const cache *c, const batch *b, const workspace *w, long l,
                   const tile *tl, long head, float *scratch) {
    long group = m->N / m->K, rows = tl->many * group, H = m->H, wide = up(H, LANES) * LANES;
    long first = b->position[tl->first], last = first + tl->many - 1;
    long window = m->layers[l].window;
    float *scores = scratch, *gathered = scores + rows * BLOCK, *most = gathered + rows * wide;
    float *total = most + rows, *keys = total + rows, *values = keys + BLOCK * wide;
    query q = {w->q + (tl->first * m->N + head * group) * H, m->N, group};
    for (long r = 0; r < rows; r++) {
        most[r] = NEVER;
        total[r] = 0;
    }
    memset(gathered, 0, rows * wide * sizeof(float));
    for (long t = 0; w->alone && t < tl->many; t++) finish_head(m, c, b, w, l, tl->first + t, head);
    long begin = window && first >= window ? (first - window + 1) / BLOCK : 0;
    for (long block = begin; block <= last / BLOCK; block++) {
        widen(m, c, l, block_at(m, c, l, b->row[tl->first], head, block), keys, values, wide);
        long r = 0;
        for (; r + 4 <= rows; r += 4) score(4, &q, r, keys, H, scores + r * BLOCK);
        if (rows - r == 3) score(3, &q, r, keys, H, scores + r * BLOCK);
        else for (; r < rows; r++) score(1, &q, r, keys, H, scores + r * BLOCK);
        for (r = 0; r < rows; r++)
            weigh(m, window, first + r / group, block, scores + r * BLOCK, most + r, total + r,
                  gathered + r * wide, wide);
        for (r = 0; r + 4 <= rows; r += 4)
            gather(4, scores + r * BLOCK, values, wide, gathered + r * wide);
        if (rows - r == 3) gather(3, scores + r * BLOCK, values, wide, gathered + r * wide);
        else for (; r < rows; r++) gather(1, scores + r * BLOCK, values, wide, gathered + r * wide);
    }
    for (long r = 0; r < rows; r++) {
        long t = tl->first + r / group, n = head * group + r % group;
        float *to = w->mixed.plain + t * w->mixed.width + n * H;
        for (long h = 0; h < H; h++) to[h] = gathered[r * wide + h] / total[r];
    }
    if (rounds_heads(m, m->layers + l))
        for (long t = tl->first; t < tl->first + tl->many; t++)
            for (long g = head * group * H / GROUP; g < (head + 1) * group * H / GROUP; g++)
                round_group(&w->mixed, t, g);
}

INLINE vec bend(int64_t activation, vec x) {
    switch (activation) {
    case SWIGLU: return x / (1.0f + exponential(-x));
    case RELU2: x = greater(x, all(0)); return x * x;
    case GEGLU_TANH:
    case GELU_TANH: return 0.5f * x * (1.0f + hyperbolic(0.7978845608f * (x + 0.044715f * x * x * x)));
    default:
        for (int i = 0; i < LANES; i++) x[i] *= 0.5f * (1.0f + erff(x[i] * 0.70710678f));
        return x;
    }
}

/* 64 rows of the MLP's hidden width for `many` tokens from t on: up, gate, bent, rounded, in one go,
 * so that what lies between never leaves the nearest cache. */
static void widen_mlp(const model *m, const layer *at, const workspace *w, long g, long t, long many) {
    float up_rows[MLP_TOKENS * GROUP], gate_rows[MLP_TOKENS * GROUP];
    long unit = g * PANELS, panels = up(m->F, PANEL), row = g * GROUP;
    long end = unit + PANELS < panels ? unit + PANELS : panels, left = m->F - row;
    tokens in = some_tokens(&w->in, t);
    product(&at->up, unit, end, &in, many, up_rows - row, GROUP);
    if (at->gate.data) product(&at->gate, unit, end, &in, many, gate_rows - row, GROUP);
    for (long n = 0; n < many; n++) {
        float *to = w->wide.plain + (t + n) * w->wide.width + row;
        for (long i = 0; i < GROUP; i += LANES) {
            vec x = load_some(up_rows + n * GROUP + i, left - i);
            if (at->gate.data)
                x *= bend(m->activation, load_some(gate_rows + n * GROUP + i, left - i));
            else x = bend(m->activation, x);
            store(to + i, x);
        }
        if (!is_plain(&at->down)) round_group(&w->wide, t + n, g);
    }
}

/* Add what a branch has made to the stream, then prepare what the next one reads. */
static void add_and_norm(const model *m, const workspace *w, const norm *out, const norm *in,
                         const matrix *reader, long t) {
    float *x = w->x + t * w->in.width, *to = w->in.plain + t * w->in.width;
    const float *made = w->out + t * w->in.width;
    if (out && out->weight) {
        normalise(m, out, made, m->D, to);
        made = to;
    }
    for (long i = 0; out && i < m->D; i++) x[i] += made[i];
    if (in->weight) normalise(m, in, x, m->D, to);
    else memcpy(to, x, m->D * sizeof(float));
    if (!is_plain(reader)) round_token(&w->in, t);
}

/* A loop over this thread's share of T tokens, or over all of them on its own copy; then MEET. */
#define EACH_TOKEN(t, T)                                                                         \
    for (long t = w->alone ? 0 : (T) * thread() / team(), end_ = w->alone ? (T)                  \
                                                               : (T) * (thread() + 1) / team();  \
         t < end_; t++)
static void meet(const workspace *w) {
    if (!w->alone) {
#pragma omp barrier
    }
}

typedef struct {
    const matrix *m;
    float *y;
    long stride;
} job;

/* Some products of the same tokens, shared among the threads in pieces of 64 rows. */
static void multiply(const job *jobs, int count, const tokens *x, long many) {
    long pieces[4] = {0}, total = 0;
    for (int i = 0; i < count; i++) total += pieces[i] = up(jobs[i].m->rows, GROUP);
#pragma omp for schedule(dynamic)
    for (long piece = 0; piece < total; piece++) {
        long at = piece;
        const job *j = jobs;
        for (const long *n = pieces; at >= *n; n++, j++) at -= *n;
        long panels = up(j->m->rows, PANEL), end = (at + 1) * PANELS;
        product(j->m, at * PANELS, end < panels ? end : panels, x, many, j->y, j->stride);
    }
}

static void run_layer(const model *m, const cache *c, const batch *b, const workspace *w, long l,
                      float *scratch) {
    const layer *at = m->layers + l, *next = l + 1 < m->L ? at + 1 : NULL;
    long T = b->many, H = m->H, D = w->in.width;
    job qkv[] = {{&at->q, w->q, m->N * H}, {&at->k, w->k, m->K * H}, {&at->v, w->v, m->K * H}};
    job o = {&at->o, w->out, D}, down = {&at->down, w->out, D};
    multiply(qkv, 3, &w->in, T);
    if (at->query.weight && m->whole) {
#pragma omp for
        for (long t = 0; t < T; t++) normalise_heads(m, at, w, t);
    }
    if (!w->alone) {  /* else a tile holds all new tokens of its row, and finishes them itself */
#pragma omp for
        for (long i = 0; i < T * m->K; i++) finish_head(m, c, b, w, l, i / m->K, i % m->K);
    }
#pragma omp for schedule(dynamic)
    for (long i = w->tile_count * m->K - 1; i >= 0; i--)
        attend(m, c, b, w, l, w->tiles + i / m->K, i % m->K, scratch);
    if (!is_plain(&at->o) && !rounds_heads(m, at)) {
#pragma omp for
        for (long t = 0; t < T; t++) round_token(&w->mixed, t);
    }
    multiply(&o, 1, &w->mixed, T);
    EACH_TOKEN(t, T) add_and_norm(m, w, &at->attention_out, &at->mlp_in, &at->up, t);
    meet(w);
    long parts = up(T, MLP_TOKENS), pieces = w->wide.width / GROUP * parts;
#pragma omp for schedule(dynamic)
    for (long i = 0; i < pieces; i++) {
        long t = i % parts * MLP_TOKENS, left = T - t;
        widen_mlp(m, at, w, i / parts, t, left < MLP_TOKENS ? left : MLP_TOKENS);
    }
    multiply(&down, 1, &w->wide, T);
    EACH_TOKEN(t, T)
        add_and_norm(m, w, &at->mlp_out, next ? &next->attention_in : &m->final,
                     next ? &next->q : &m->head, t);
    meet(w);
}

static void embed(const model *m, const batch *b, const workspace *w, long t) {
    float *x = w->x + t * w->in.width, *learned = w->in.plain + t * w->in.width;
    look_up(&m->embedding, b->token[t], x);
    for (long i = 0; i < m->D; i++) x[i] *= m->embedding_scale;
    if (m->positions.data) {
        look_up(&m->positions, b->position[t], learned);
        for (long i = 0; i < m->D; i++) x[i] += learned[i];
    }
    add_and_norm(m, w, NULL, &m->layers->attention_in, &m->layers->q, t);
}

/* Cut the tokens into tiles of one row and up to TILE positions that follow each other. Every
 * thread does, for itself. */
static void cut(const batch *b, workspace *w) {
    w->tile_count = 0;
    for (long t = 0; t < b->many; t++) {
        tile *now = w->tiles + w->tile_count - 1;
        int grows = t && b->row[t] == b->row[t - 1] && b->position[t] == b->position[t - 1] + 1;
        if (grows && now->many < TILE) now->many++;
        else w->tiles[w->tile_count++] = (tile){t, 1};
    }
}

/* Run all tokens and write the logits of the wanted ones: (wanted, V).
 *
 * `work` has workspace_bytes(m, room, threads), zeros before the first call; what is beyond the
 * width of a model stays zero. `room` tokens are the most there may be.
 */
void forward(const model *m, const cache *c, const batch *b, char *work, int64_t room,
             float *logits, int threads) {
    int alone = b->many <= FEW;
#pragma omp parallel num_threads(threads)
    {
        workspace mine, *w = &mine;
        lay_out(m, room, threads, thread(), alone, work, w);
        cut(b, w);
        float *scratch = w->scratch + thread() * w->scratch_size;
        EACH_TOKEN(t, b->many) embed(m, b, w, t);
        meet(w);
        for (long l = 0; l < m->L; l++) run_layer(m, c, b, w, l, scratch);
#pragma omp for
        for (long i = 0; i < b->wanted; i++) {
            float *to = w->last.plain + i * w->last.width;
            memcpy(to, w->in.plain + b->which[i] * w->in.width, w->in.width * sizeof(float));
            if (!is_plain(&m->head)) round_token(&w->last, i);
        }
        job head = {&m->head, logits, m->V};
        if (b->wanted) multiply(&head, 1, &w->last, b->wanted);
        if (m->logit_cap) {
#pragma omp for
            for (long i = 0; i < b->wanted * m->V; i++)
                logits[i] = m->logit_cap * tanhf(logits[i] / m->logit_cap);
        }
    }
}
