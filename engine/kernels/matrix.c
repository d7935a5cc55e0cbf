/* y = W x for many tokens at once, with W as it lies on disk (engine/quantize.py has the layouts).
 *
 * int8, int4: x is rounded to bytes in groups of 32 with a scale each, products are summed exactly
 * as integers within a group, and groups in order: whatever the tile, y is the same to the bit. The
 * same holds for plain weights, whose products are summed 16 apart and folded at the end.
 */

#include "matrix.h"

enum { STEPS = HALF / 4, STEP = PANEL * 4 };  /* a step is 64 bytes of weights */
enum { SLICES = PANEL / LANES };  /* of a panel, each a register */
enum { AHEAD = 1024 };            /* bytes of weights that are asked for before their turn */
/* The largest tiles that registers hold: plain rows × 4 tokens, slices × MANY tokens. */
enum { TALL = REGISTERS / 8, FEW = 4, WIDE = LANES == 4 ? 4 : 2, MANY = REGISTERS / 2 / WIDE };

/* Round 64 numbers of a token to bytes, in two halves: scale = largest / 127. */
void round_group(const tokens *x, long t, long g) {
    long first = t * x->width + g * GROUP;
    for (long h = first / HALF; h < first / HALF + 2; h++) {
        vec most = all(0);
        EACH(i, HALF / LANES) most = greater(magnitude(load(x->plain + h * HALF + i * LANES)), most);
        float top = largest(most), by = top > 0 ? 127 / top : 0;
        ivec total = all_int(0);
        EACH(i, HALF / LANES) {
            ivec q = to_int(nearest(load(x->plain + h * HALF + i * LANES) * by));
            narrow bytes = __builtin_convertvector(q, narrow);
            memcpy(x->bytes + h * HALF + i * LANES, &bytes, LANES);
            total += q;
        }
        x->scale[h] = top / 127;
        x->sums[h] = 0;
        for (int i = 0; i < LANES; i++) x->sums[h] += total[i];
    }
}

void round_token(const tokens *x, long t) {
    for (long g = 0; g < x->width / GROUP; g++) round_group(x, t, g);
}

INLINE int32_t word(const int8_t *p) { int32_t w; memcpy(&w, p, 4); return w; }

/* Where the p-th slice is, counted from the first: `panel` and `row` numbers long are theirs. */
INLINE long slice(int p, long panel, long row) {
    return p / SLICES * panel + p % SLICES * LANES * row;
}

/* P slices of int8, whose groups of 64 have a scale a row, × N tokens from token t on: y[p][n]. */
INLINE void tile_bytes(const int P, const int N, const matrix *m, const uint8_t *w, long panel,
                       const uint16_t *scale, long scale_panel, const tokens *x, long t,
                       vec y[WIDE][MANY]) {
    long steps = up(m->columns, 4), halves = up(steps, STEPS), per_token = x->width / HALF;
    const int8_t *bytes = x->bytes + t * x->width;
    for (long h = 0; h < halves; h++, w += STEPS * STEP, bytes += HALF) {
        ivec acc[WIDE][MANY];
        EACH(n, N) EACH(p, P) acc[p][n] = begin(x->sums[(t + n) * per_token + h]);
        long many = steps - h * STEPS < STEPS ? steps - h * STEPS : STEPS;
        for (long s = 0; s < many; s++)
            EACH(p, P) {
                const uint8_t *from = w + slice(p, panel, 4) + s * STEP;
                ivec q = load_int(from);
                if (p % SLICES == 0) __builtin_prefetch(from + AHEAD);
                EACH(n, N)
                    acc[p][n] = dot(acc[p][n], q, word(bytes + n * x->width + 4 * s));
            }
        EACH(p, P) {
            vec by = load_half(scale + slice(p, scale_panel, 1) + h / 2 * PANEL);
            EACH(n, N) y[p][n] += to_float(acc[p][n]) * (by * x->scale[(t + n) * per_token + h]);
        }
    }
}

/* The same for int4, whose groups of 32 have a scale and a minimum a row. */
INLINE void tile_nibbles(const int P, const int N, const matrix *m, const uint8_t *w, long panel,
                         const uint16_t *scale, long scale_panel, const tokens *x, long t,
                         vec y[WIDE][MANY]) {
    long groups = up(m->columns, HALF), per_token = x->width / HALF;
    const int8_t *bytes = x->bytes + t * x->width;
    for (long g = 0; g < groups; g++, w += 4 * STEP, scale += 2 * PANEL, bytes += HALF) {
        ivec acc[WIDE][MANY];
        EACH(p, P)
            EACH(n, N) acc[p][n] = all_int(0);
        EACH(c, 4)
            EACH(p, P) {
                const uint8_t *from = w + slice(p, panel, 4) + c * STEP;
                ivec pair = load_int(from);
                if (p % SLICES == 0) __builtin_prefetch(from + AHEAD);
                ivec low = pair & 0x0f0f0f0f, high = (pair >> 4) & 0x0f0f0f0f;
                EACH(n, N) {
                    const int8_t *b = bytes + n * x->width + 8 * c;
                    acc[p][n] = dot_small(acc[p][n], low, word(b));
                    acc[p][n] = dot_small(acc[p][n], high, word(b + 4));
                }
            }
        EACH(p, P) {
            vec by = load_half(scale + slice(p, scale_panel, 1));
            vec least = load_half(scale + slice(p, scale_panel, 1) + PANEL);
            EACH(n, N) {
                float s = x->scale[(t + n) * per_token + g];
                float total = s * x->sums[(t + n) * per_token + g];
                y[p][n] += by * (to_float(acc[p][n]) * s) + least * total;
            }
        }
    }
}

INLINE vec load_plain(const int format, const void *row, long k) {
    if (format == PLAIN32) return load((const float *)row + k);
    if (format == PLAIN16) return load_half((const uint16_t *)row + k);
    return load_bf16((const uint16_t *)row + k);
}

/* The end of a row, where 16 numbers may not be there to load. */
APART vec load_rest(int format, const void *row, long k, long columns) {
    float rest[LANES] = {0};
    long size = format == PLAIN32 ? 4 : 2;
    memcpy(rest, (const char *)row + k * size, (columns - k) * size);
    return load_plain(format, rest, 0);
}

/* R rows of plain weights × N tokens; y[token][row] are the sums. */
INLINE void tile_plain(const int format, const int R, const int N, const matrix *m, long row,
                       const tokens *x, long t, float *y, long y_stride) {
    long size = format == PLAIN32 ? 4 : 2, K = m->columns, whole = K - K % LANES;
    const char *w = (const char *)m->data + row * K * size;
    const float *from = x->plain + t * x->width;
    vec acc[TALL][FEW];
    EACH(r, R)
        EACH(n, N) acc[r][n] = all(0);
    for (long k = 0; k < whole; k += LANES) {
        vec a[FEW];
        EACH(n, N) a[n] = load(from + n * x->width + k);
        EACH(r, R) {
            vec b = load_plain(format, w + r * K * size, k);
            __builtin_prefetch(w + r * K * size + k * size + 4 * AHEAD);
            EACH(n, N) acc[r][n] += b * a[n];
        }
    }
    if (whole < K)
        EACH(r, R) {
            vec b = load_rest(format, w + r * K * size, whole, K);
            EACH(n, N) acc[r][n] += b * load(from + n * x->width + whole);
        }
    EACH(r, R)
        EACH(n, N) y[n * y_stride + row + r] = sum(acc[r][n]);
}

/* P slices from the s-th on, for N tokens. */
INLINE void tile_panels(const int format, const int P, const int N, const matrix *m, long s,
                        const tokens *x, long t, float *y, long y_stride) {
    long panel = STEP * (format == BYTES ? up(m->columns, 4) : 4 * up(m->columns, HALF));
    long scales = PANEL * (format == BYTES ? up(m->columns, GROUP) : 2 * up(m->columns, HALF));
    const uint8_t *w = (const uint8_t *)m->data + slice(s, panel, 4);
    const uint16_t *scale = (const uint16_t *)m->scale + slice(s, scales, 1);
    vec sums[WIDE][MANY];
    EACH(p, P)
        EACH(n, N) sums[p][n] = all(0);
    if (format == BYTES) tile_bytes(P, N, m, w, panel, scale, scales, x, t, sums);
    else tile_nibbles(P, N, m, w, panel, scale, scales, x, t, sums);
    EACH(p, P) {
        long row = (s + p) * LANES, left = m->rows - row;
        EACH(n, N) store_some(y + n * y_stride + row, sums[p][n], left);
    }
}

/* Call TILE(N) with as many of the tokens as a tile takes, until all of them are done. */
#define FOR_TOKENS(TILE, MOST)                                                                   \
    for (long t = 0, left = many; left > 0;) {                                                   \
        if (left >= MOST) { TILE(MOST); t += MOST; left -= MOST; }                               \
        else if (MOST > 4 && left >= 4) { TILE(4); t += 4; left -= 4; }                                      \
        else if (MOST > 2 && left >= 2) { TILE(2); t += 2; left -= 2; }                                      \
        else { TILE(1); t += 1; left -= 1; }                                                     \
    }

INLINE void panels(const int format, const matrix *m, long s, long end, const tokens *x,
                   long many, float *y, long stride) {
#define SOME(N) tile_panels(format, WIDE, N, m, s, x, t, y + t * stride, stride)
#define ONE(N) tile_panels(format, 1, N, m, s, x, t, y + t * stride, stride)
    for (; s + WIDE <= end; s += WIDE) FOR_TOKENS(SOME, MANY)
    for (; s < end; s++)
        for (long t = 0; t < many; t++) ONE(1);
}

INLINE void plain_rows(const int format, const matrix *m, long row, long end, const tokens *x,
                       long many, float *y, long stride) {
#define FOUR(N) tile_plain(format, TALL, N, m, row, x, t, y + t * stride, stride)
#define SINGLE(N) tile_plain(format, 1, N, m, row, x, t, y + t * stride, stride)
    for (; row + TALL <= end; row += TALL) FOR_TOKENS(FOUR, FEW)
    for (; row < end; row++)
        for (long t = 0; t < many; t++) SINGLE(1);
}

/* Rows 16 · unit up to 16 · end of W times the first `many` tokens, bias added: y[token][row]. */
void product(const matrix *m, long unit, long end, const tokens *x, long many, float *y,
                    long stride) {
    long row = unit * PANEL, last = end * PANEL < m->rows ? end * PANEL : m->rows;
    long s = unit * SLICES, slices = end * SLICES;
    switch (m->format) {
    case PLAIN32: plain_rows(PLAIN32, m, row, last, x, many, y, stride); break;
    case PLAIN16: plain_rows(PLAIN16, m, row, last, x, many, y, stride); break;
    case BRAIN16: plain_rows(BRAIN16, m, row, last, x, many, y, stride); break;
    case BYTES: panels(BYTES, m, s, slices, x, many, y, stride); break;
    case NIBBLES: panels(NIBBLES, m, s, slices, x, many, y, stride); break;
    }
    if (m->bias)
        for (long t = 0; t < many; t++)
            for (long r = row; r < last; r++) y[t * stride + r] += m->bias[r];
}

/* One row of W as numbers: a token's embedding. */
void look_up(const matrix *m, long row, float *to) {
    long K = m->columns, lane = row % PANEL, panel = row / PANEL;
    const uint8_t *bytes = (const uint8_t *)m->data;
    if (m->format == BYTES) {
        const uint8_t *w = bytes + panel * up(K, 4) * STEP + lane * 4;
        const uint16_t *s = (const uint16_t *)m->scale + panel * up(K, GROUP) * PANEL + lane;
        for (long k = 0; k < K; k++)
            to[k] = (w[k / 4 * STEP + k % 4] - 128) * from_half(s[k / GROUP * PANEL]);
    } else if (m->format == NIBBLES) {
        const uint8_t *w = bytes + panel * up(K, HALF) * 4 * STEP + lane * 4;
        const uint16_t *s = (const uint16_t *)m->scale + panel * up(K, HALF) * 2 * PANEL;
        for (long k = 0; k < K; k++) {
            uint8_t q = w[k / 8 * STEP + k % 4] >> (k / 4 % 2 ? 4 : 0) & 15;
            const uint16_t *group = s + k / HALF * 2 * PANEL + lane;
            to[k] = q * from_half(group[0]) + from_half(group[PANEL]);
        }
    } else
        for (long k = 0; k < K; k++)
            to[k] = m->format == PLAIN32   ? ((const float *)m->data)[row * K + k]
                    : m->format == PLAIN16 ? from_half(((const uint16_t *)m->data)[row * K + k])
                                           : from_brain(((const uint16_t *)m->data)[row * K + k]);
}
