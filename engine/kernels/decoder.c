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
/* How loops share their pieces: large ones first, which costs the fewest questions, or one by one,
 * which waits for no thread that is slow. */
static void share(int large_first) {
    omp_set_schedule(large_first ? omp_sched_guided : omp_sched_dynamic, 1);
}
#else
static int thread(void) { return 0; }
static int team(void) { return 1; }
static void share(int large_first) { (void)large_first; }
#endif

enum { BLOCK = 64, VECS = BLOCK / LANES, TILE = 32 };       /* TILE: queries that share a key */
enum { PANELS = GROUP / PANEL, MLP_TOKENS = 64, TALL = 4 }; /* of what one piece of work takes */
enum { FEW = 8, AHEAD = 2048 };
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
    float *scratch;  /* this thread's own */
    float *parts;    /* of few tokens, what each block of keys has given each of their heads */
    int *done;       /* and how many pieces of a head's blocks are done; 0 between the layers */
    long blocks;     /* the most that a token sees */
} workspace;

static long columns(const model *m) { return up(m->H, LANES) * LANES; }  /* of a head, whole vecs */

/* Numbers of a gathering of `rows` queries. */
static long gathering_size(const model *m, long rows) { return rows * (columns(m) + 2); }

static long scratch_size(const model *m) {
    long rows = TILE * (m->N / m->K);
    return rows * (m->H + BLOCK) + 2 * BLOCK * columns(m) + 2 * gathering_size(m, rows);
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
static size_t lay_out(const model *m, long many, long blocks, int threads, int thread, int alone,
                      char *from, workspace *w) {
    char *begin = from;
    long D = up(m->D, GROUP) * GROUP, few = many < FEW ? many : FEW;
    w->alone = alone;
    w->blocks = blocks;
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
        float *scratch = (float *)take(&from, scratch_size(m) * sizeof(float));
        if (i == thread) w->tiles = tiles, w->scratch = scratch;
    }
    w->parts = (float *)take(&from, blocks * gathering_size(m, few * m->N) * sizeof(float));
    w->done = (int *)take(&from, few * m->K * sizeof(int));
    return from - begin;
}

/* What forward() needs for `many` tokens, each of which sees at most so many blocks. */
size_t workspace_bytes(const model *m, int64_t many, int64_t blocks, int threads) {
    workspace w;
    return lay_out(m, many, blocks, threads, 0, 0, NULL, &w);
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

/* Norm and rotation of a head of queries or keys. */
static void turn(const model *m, const cache *c, const layer *at, const norm *by, long position,
                 float *x) {
    if (by->weight && !m->whole) normalise(m, by, x, m->H, x);
    if (at->rotation >= 0) {
        long pairs = m->rotary / 2, from = position * pairs;
        rotate(x, c->cosine[at->rotation] + from, c->sine[at->rotation] + from, pairs);
    }
}

/* Put a token's keys and values of one head into the cache. */
static void keep_head(const model *m, const cache *c, const batch *b, const workspace *w, long l,
                      long t, long head) {
    long H = m->H, p = b->position[t], size = number_bytes(c->format), i = p % BLOCK;
    float *k = w->k + (t * m->K + head) * H;
    turn(m, c, m->layers + l, &m->layers[l].key, p, k);
    long block = block_at(m, c, l, b->row[t], head, p / BLOCK);
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

/* Ask for what will be read soon: the processor does not look beyond a page by itself. */
INLINE void ask_ahead(const char *at, long bytes) {
    for (long i = 0; i < bytes; i += 64) __builtin_prefetch(at + AHEAD + i);
}

/* Scores of R queries and the 64 keys of a block. */
INLINE void score(const int R, const int format, const float *q, const char *keys, long H,
                  float *scores) {
    long size = number_bytes(format);
    vec acc[TALL][VECS];
    EACH(r, R)
        EACH(i, VECS) acc[r][i] = all(0);
    for (long h = 0; h < H; h++) {
        vec k[VECS];
        if (format == PLAIN16) ask_ahead(keys + h * BLOCK * size, BLOCK * size);
        EACH(i, VECS) k[i] = load_kept(format, keys + (h * BLOCK + i * LANES) * size);
        EACH(r, R) {
            vec x = all(q[r * H + h]);
            EACH(i, VECS) acc[r][i] += x * k[i];
        }
    }
    EACH(r, R)
        EACH(i, VECS) store(scores + r * BLOCK + i * LANES, acc[r][i]);
}

/* The values of a block, weighted and added for R queries: W · 16 columns from h on. */
INLINE void gather_columns(const int R, const int W, const int format, const float *weights,
                           const char *values, long wide, long h, float *to) {
    long size = number_bytes(format);
    vec acc[TALL][4];
    EACH(r, R)
        EACH(i, W) acc[r][i] = all(0);
    for (long s = 0; s < BLOCK; s++) {
        vec v[4];
        if (format == PLAIN16) ask_ahead(values + (s * wide + h) * size, W * LANES * size);
        EACH(i, W) v[i] = load_kept(format, values + (s * wide + h + i * LANES) * size);
        EACH(r, R) {
            vec x = all(weights[r * BLOCK + s]);
            EACH(i, W) acc[r][i] += x * v[i];
        }
    }
    EACH(r, R)
        EACH(i, W) store(to + r * wide + h + i * LANES, acc[r][i]);
}

INLINE void gather(const int R, const int format, const float *weights, const char *values,
                   long wide, float *to) {
    long h = 0;
    for (; h + 4 * LANES <= wide; h += 4 * LANES)
        gather_columns(R, 4, format, weights, values, wide, h, to);
    for (; h < wide; h += LANES) gather_columns(R, 1, format, weights, values, wide, h, to);
}

/* Turn a query's scores into weights, and note the largest score and the weights' sum. */
static void weigh(const model *m, long window, long position, long block, float *scores, float *most,
                  float *total) {
    vec s[VECS], top = all(NEVER);
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
    *most = largest(top);
    vec sums = all(0);
    EACH(i, VECS) {
        vec weight = exponential(s[i] - *most);
        if (!all_seen) weight = choose(seen[i], weight, all(0));
        store(scores + i * LANES, weight);
        sums += weight;
    }
    *total = sum(sums);
}

/* What queries have gathered: values weighted by e^(score - most), the largest score, and the sum
 * of the weights. Blocks are gathered one by one and merged in order (Dao et al. 2022), so it is
 * nothing to the outcome who does which. */
typedef struct {
    float *values, *most, *total;  /* (rows, columns), (rows), (rows) */
} gathering;

static gathering gathering_at(const model *m, long rows, float *at) {
    long wide = columns(m);
    return (gathering){at, at + rows * wide, at + rows * wide + rows};
}

__attribute__((noinline)) static void merge(long rows, long wide, gathering to, gathering part) {
    for (long r = 0; r < rows; r += LANES) {
        long left = rows - r;
        vec most = load_some(to.most + r, left), other = load_some(part.most + r, left);
        vec top = greater(most, other), old = exponential(most - top), new = exponential(other - top);
        vec total = load_some(to.total + r, left) * old + load_some(part.total + r, left) * new;
        store_some(to.most + r, top, left);
        store_some(to.total + r, total, left);
        for (long i = 0; i < left && i < LANES; i++)
            for (long h = (r + i) * wide; h < (r + i + 1) * wide; h += LANES)
                store(to.values + h, load(to.values + h) * old[i] + load(part.values + h) * new[i]);
    }
}

/* Queries that read the same keys, from those of the token at `position` on. */
typedef struct {
    const float *q;  /* (rows, H) */
    long rows, group, position;
} queries;

INLINE void gather_block(const int format, const model *m, long window, long block,
                         const queries *of, const char *keys, const char *values, float *scores,
                         gathering to) {
    long H = m->H, wide = columns(m), r = 0;
#define SCORE(R) score(R, format, of->q + r * H, keys, H, scores + r * BLOCK)
#define GATHER(R) gather(R, format, scores + r * BLOCK, values, wide, to.values + r * wide)
#define EACH_ROW(DO)                                                                             \
    for (r = 0; r + TALL <= of->rows; r += TALL) DO(TALL);                                       \
    switch (of->rows - r) {                                                                      \
    case 3: DO(3); break;                                                                        \
    case 2: DO(2); break;                                                                        \
    case 1: DO(1);                                                                               \
    }
    EACH_ROW(SCORE)
    for (r = 0; r < of->rows; r++)
        weigh(m, window, of->position + r / of->group, block, scores + r * BLOCK, to.most + r,
              to.total + r);
    EACH_ROW(GATHER)
}

/* What queries gather from the block that begins at `kept` in the cache. */
static void attend_block(const model *m, const cache *c, long l, long block, long kept,
                         const queries *of, float *scratch, gathering to) {
    long size = number_bytes(c->format), wide = columns(m), window = m->layers[l].window;
    float *scores = scratch, *keys = scores + of->rows * BLOCK, *values = keys + BLOCK * wide;
    const char *k = c->keys[l] + kept * BLOCK * m->H * size;
    const char *v = c->values[l] + kept * BLOCK * m->H * size;
    if (of->rows > TALL || c->format == BYTES || wide > m->H) {  /* else each is read only once */
        widen(m, c, l, kept, keys, values, wide);
        k = (char *)keys, v = (char *)values, size = number_bytes(PLAIN32);
    }
    if (size == 2) gather_block(PLAIN16, m, window, block, of, k, v, scores, to);
    else gather_block(PLAIN32, m, window, block, of, k, v, scores, to);
}

/* Whether what a head of keys has gathered makes whole groups, to be rounded at once. */
static int rounds_heads(const model *m, const layer *at) {
    return !is_plain(&at->o) && m->N / m->K * m->H % GROUP == 0;
}

/* Divide what a tile's queries have gathered by the sum of weights, as the next product reads it. */
static void finish_head(const model *m, const workspace *w, const layer *at, const tile *tl,
                        long head, gathering from) {
    long group = m->N / m->K, H = m->H, wide = columns(m);
    for (long r = 0; r < tl->many * group; r++) {
        long t = tl->first + r / group, n = head * group + r % group;
        float *to = w->mixed.plain + t * w->mixed.width + n * H;
        for (long h = 0; h < H; h++) to[h] = from.values[r * wide + h] / from.total[r];
    }
    if (rounds_heads(m, at))
        for (long t = tl->first; t < tl->first + tl->many; t++)
            for (long g = head * group * H / GROUP; g < (head + 1) * group * H / GROUP; g++)
                round_group(&w->mixed, t, g);
}

/* Attention of a tile of queries over one head of keys: the n-th of some equal pieces of the blocks
 * that it sees. Few tokens have their blocks shared among the threads so: each block's gathering is
 * kept, and who ends last merges them. New keys go into the cache before their block is read. */
static void attend(const model *m, const cache *c, const batch *b, const workspace *w, long l,
                   const tile *tl, long head, long n, long pieces) {
    const layer *at = m->layers + l;
    long group = m->N / m->K, rows = tl->many * group, H = m->H, first = b->position[tl->first];
    long begin = at->window && first >= at->window ? (first - at->window + 1) / BLOCK : 0;
    long blocks = (first + tl->many - 1) / BLOCK + 1 - begin, step = gathering_size(m, rows);
    float *q = w->scratch, *kept = q + rows * H, *free = kept + 2 * step;
    if (w->alone) kept = w->parts + gathering_size(m, (tl->first * m->N + head * rows) * w->blocks);
    for (long r = 0; r < rows; r++) {
        long t = tl->first + r / group;
        memcpy(q + r * H, w->q + (t * m->N + head * group + r % group) * H, H * sizeof(float));
        turn(m, c, at, &at->query, b->position[t], q + r * H);
    }
    queries of = {q, rows, group, first};
    gathering whole = gathering_at(m, rows, w->scratch + rows * H + step);
    for (long r = 0; r < rows; r++) whole.most[r] = NEVER, whole.total[r] = 0;
    memset(whole.values, 0, rows * columns(m) * sizeof(float));
    for (long i = blocks * n / pieces; i < blocks * (n + 1) / pieces; i++) {
        for (long t = tl->first; w->alone && t < tl->first + tl->many; t++)
            if (b->position[t] / BLOCK == begin + i) keep_head(m, c, b, w, l, t, head);
        gathering part = gathering_at(m, rows, w->alone ? kept + i * step : kept);
        long place = block_at(m, c, l, b->row[tl->first], head, begin + i);
        attend_block(m, c, l, begin + i, place, &of, free, part);
        if (!w->alone) merge(rows, columns(m), whole, part);
    }
    if (w->alone) {
        int *done = w->done + tl->first * m->K + head * tl->many;
        if (__atomic_add_fetch(done, 1, __ATOMIC_ACQ_REL) < pieces) return;
        *done = 0;
        for (long i = 0; i < blocks; i++)
            merge(rows, columns(m), whole, gathering_at(m, rows, kept + i * step));
    }
    finish_head(m, w, at, tl, head, whole);
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

/* Some products of the same tokens, shared among the threads in pieces of some panels. */
static void multiply(const job *jobs, int count, const tokens *x, long many) {
    long pieces[4], total = 0, size = many > FEW ? PANELS : 2;
    for (int i = 0; i < count; i++) total += pieces[i] = up(jobs[i].m->rows, PANEL * size);
#pragma omp for schedule(runtime)
    for (long piece = 0; piece < total; piece++) {
        long at = piece;
        const job *j = jobs;
        for (const long *n = pieces; at >= *n; n++, j++) at -= *n;
        long panels = up(j->m->rows, PANEL), end = (at + 1) * size;
        product(j->m, at * size, end < panels ? end : panels, x, many, j->y, j->stride);
    }
}

static void run_layer(const model *m, const cache *c, const batch *b, const workspace *w, long l) {
    const layer *at = m->layers + l, *next = l + 1 < m->L ? at + 1 : NULL;
    long T = b->many, H = m->H, D = w->in.width;
    job qkv[] = {{&at->q, w->q, m->N * H}, {&at->k, w->k, m->K * H}, {&at->v, w->v, m->K * H}};
    job o = {&at->o, w->out, D}, down = {&at->down, w->out, D};
    multiply(qkv, 3, &w->in, T);
    if (at->query.weight && m->whole) {
#pragma omp for
        for (long t = 0; t < T; t++) normalise_heads(m, at, w, t);
    }
    if (!w->alone) {  /* else a tile holds all new tokens of its row, and keeps them itself */
#pragma omp for
        for (long i = 0; i < T * m->K; i++) keep_head(m, c, b, w, l, i / m->K, i % m->K);
    }
    long pieces = w->alone ? team() : 1;
#pragma omp for schedule(runtime)
    for (long i = w->tile_count * m->K * pieces - 1; i >= 0; i--) {
        long head = i / pieces;
        attend(m, c, b, w, l, w->tiles + head / m->K, head % m->K, i % pieces, pieces);
    }
    if (!is_plain(&at->o) && !rounds_heads(m, at)) {
#pragma omp for
        for (long t = 0; t < T; t++) round_token(&w->mixed, t);
    }
    multiply(&o, 1, &w->mixed, T);
    EACH_TOKEN(t, T) add_and_norm(m, w, &at->attention_out, &at->mlp_in, &at->up, t);
    meet(w);
    long parts = up(T, MLP_TOKENS), groups = w->wide.width / GROUP;
#pragma omp for schedule(runtime)
    for (long i = 0; i < groups * parts; i++) {
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
 * `work` has workspace_bytes(m, room, blocks, threads), zeros before the first call; what is beyond the
 * width of a model stays zero. `room` tokens and `blocks` are the most there may be.
 */
void forward(const model *m, const cache *c, const batch *b, char *work, int64_t room,
             int64_t blocks, float *logits, int threads) {
    int alone = b->many <= FEW;
    share(alone);
#pragma omp parallel num_threads(threads)
    {
        workspace mine, *w = &mine;
        lay_out(m, room, blocks, threads, thread(), alone, work, w);
        cut(b, w);
        EACH_TOKEN(t, b->many) embed(m, b, w, t);
        meet(w);
        for (long l = 0; l < m->L; l++) run_layer(m, c, b, w, l);
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
