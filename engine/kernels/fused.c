/* The parts of a training step that are bound by memory or by many small products, in one pass each.
 *
 * Everything is fp32. Rows are tokens. Gradients of weights are summed per thread and then in
 * thread order, so that a result depends on the number of threads and on nothing else.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* e^x to one unit in the last place or so, without branches, so that loops over it vectorise. */
static inline float exp_(float x) {
    x = x < -87.3f ? -87.3f : x > 88.3f ? 88.3f : x;
    float n = rintf(x * 1.44269504f), r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1;
    union { int32_t i; float f; } power = {((int32_t)n + 127) << 23};
    return p * power.f;
}

/* --- RMSNorm: y = x · r · weight, r = 1 / rms(x) --------------------------------------------- */

void norm_forward(const float *x, const float *weight, float eps, long rows, long width, float *y,
                  float *r, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long row = 0; row < rows; row++) {
        const float *from = x + row * width;
        float *to = y + row * width, sum = 0;
#pragma omp simd reduction(+ : sum)
        for (long i = 0; i < width; i++) sum += from[i] * from[i];
        float inverse = r[row] = 1 / sqrtf(sum / width + eps);
#pragma omp simd
        for (long i = 0; i < width; i++) to[i] = from[i] * inverse * weight[i];
    }
}

/* dx = g·r - x·r³·mean(g·x) with g = weight·dy; dweight = Σ dy·x·r, a row of it per thread. */
void norm_backward(const float *x, const float *weight, const float *r, const float *dy, long rows,
                   long width, float *dx, float *dweight, int threads) {
    long each = (rows + threads - 1) / threads;
    memset(dweight, 0, sizeof(float) * threads * width);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int thread = 0; thread < threads; thread++) {
        float *sums = dweight + thread * width;
        long last = (thread + 1) * each < rows ? (thread + 1) * each : rows;
        for (long row = thread * each; row < last; row++) {
            const float *a = x + row * width, *d = dy + row * width;
            float *to = dx + row * width, scale = r[row], inner = 0;
#pragma omp simd reduction(+ : inner)
            for (long i = 0; i < width; i++) inner += d[i] * weight[i] * a[i];
            inner *= scale * scale * scale / width;
#pragma omp simd
            for (long i = 0; i < width; i++) {
                sums[i] += d[i] * a[i] * scale;
                to[i] = d[i] * weight[i] * scale - a[i] * inner;
            }
        }
    }
}

/* --- rotary positions: pairs (i, i + half) of each head turned by their position's angle --------- */

/* `sign` 1 turns, -1 turns back, which is the gradient. Rows are B × T tokens of `heads` heads. */
void rotate(const float *x, const float *cosine, const float *sine, float sign, long rows, long T,
            long heads, long head_dim, long rotary, float *y, int threads) {
    long half = rotary / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long row = 0; row < rows; row++) {
        const float *c = cosine + row % T * rotary, *s = sine + row % T * rotary;
        for (long head = 0; head < heads; head++) {
            const float *from = x + (row * heads + head) * head_dim;
            float *to = y + (row * heads + head) * head_dim;
#pragma omp simd
            for (long i = 0; i < half; i++) {
                float a = from[i], b = from[i + half], turn = sign * s[i];
                to[i] = a * c[i] - b * turn;
                to[i + half] = b * c[i] + a * turn;
            }
            for (long i = rotary; i < head_dim; i++) to[i] = from[i];
        }
    }
}

/* --- SwiGLU: y = gate · sigmoid(gate) · up ------------------------------------------------------ */

void swiglu_forward(const float *gate, const float *up, long count, float *y, int threads) {
#pragma omp parallel for simd num_threads(threads) schedule(static)
    for (long i = 0; i < count; i++) y[i] = gate[i] / (1 + exp_(-gate[i])) * up[i];
}

void swiglu_backward(const float *gate, const float *up, const float *dy, long count, float *dgate,
                     float *dup, int threads) {
#pragma omp parallel for simd num_threads(threads) schedule(static)
    for (long i = 0; i < count; i++) {
        float g = gate[i], sigmoid = 1 / (1 + exp_(-g)), d = dy[i];
        dup[i] = d * g * sigmoid;
        dgate[i] = d * up[i] * sigmoid * (1 + g * (1 - sigmoid));
    }
}

/* --- cross-entropy: logits become their gradient, softmax minus one-hot ------------------------- */

/* Returns each row's nats in `nats`; with `cap`, logits were to be squashed to ±cap first. */
void softmax_loss(float *logits, const int64_t *targets, float cap, long rows, long vocab,
                  float *nats, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long row = 0; row < rows; row++) {
        float *x = logits + row * vocab, most = -INFINITY, sum = 0;
        long target = targets[row];
        float *squashed = cap ? malloc(sizeof(float) * vocab) : NULL;
        if (cap)
            for (long i = 0; i < vocab; i++) squashed[i] = x[i] = cap * tanhf(x[i] / cap);
#pragma omp simd reduction(max : most)
        for (long i = 0; i < vocab; i++) most = x[i] > most ? x[i] : most;
        float wanted = x[target];
#pragma omp simd reduction(+ : sum)
        for (long i = 0; i < vocab; i++) sum += x[i] = exp_(x[i] - most);
        nats[row] = logf(sum) + most - wanted;
        float share = 1 / sum;
#pragma omp simd
        for (long i = 0; i < vocab; i++) x[i] *= share;
        x[target] -= 1;
        if (cap)
            for (long i = 0; i < vocab; i++) x[i] *= 1 - squashed[i] / cap * squashed[i] / cap;
        free(squashed);
    }
}

/* --- causal attention, and its gradient ---------------------------------------------------------
 *
 * A head's queries are worked in groups of GROUP rows against all keys they see, so that a group's
 * scores stay in the cache. Every product is `tile`: C (8 × up to 48) = or += A B, where A is read
 * one number at a time with any strides, B a row at a time.
 */

typedef float v16 __attribute__((vector_size(64), aligned(4), may_alias));
enum { TALL = 8, WIDE = 3, GROUP = 64 };

static inline __attribute__((always_inline)) void tile(const int width, const float *A, long row,
                                                       long step, const float *B, long B_stride,
                                                       long depth, int add, float *C,
                                                       long C_stride) {
    v16 acc[TALL][WIDE];
#pragma GCC unroll 8
    for (int i = 0; i < TALL; i++)
#pragma GCC unroll 3
        for (int j = 0; j < width; j++)
            acc[i][j] = add ? *(const v16 *)(C + i * C_stride + 16 * j) : (v16){0};
    for (long k = 0; k < depth; k++) {
        v16 b[WIDE];
#pragma GCC unroll 3
        for (int j = 0; j < width; j++) b[j] = *(const v16 *)(B + k * B_stride + 16 * j);
#pragma GCC unroll 8
        for (int i = 0; i < TALL; i++) {
            float a = A[i * row + k * step];
#pragma GCC unroll 3
            for (int j = 0; j < width; j++) acc[i][j] += a * b[j];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < TALL; i++)
#pragma GCC unroll 3
        for (int j = 0; j < width; j++) *(v16 *)(C + i * C_stride + 16 * j) = acc[i][j];
}

/* C (M × N) = or += A B over `depth`; M a multiple of 8, N of 16. */
static void product(const float *A, long row, long step, const float *B, long B_stride, long M,
                    long N, long depth, int add, float *C, long C_stride) {
    for (long n = 0, width; n < N; n += 16 * width) {
        long left = (N - n) / 16;
        width = left == 4 || left == 2 ? 2 : left < WIDE ? left : WIDE;  // a tile of one is slow
        for (long m = 0; m < M; m += TALL) {
            const float *a = A + m * row;
            float *c = C + m * C_stride + n;
            if (width == 3) tile(3, a, row, step, B + n, B_stride, depth, add, c, C_stride);
            else if (width == 2) tile(2, a, row, step, B + n, B_stride, depth, add, c, C_stride);
            else tile(1, a, row, step, B + n, B_stride, depth, add, c, C_stride);
        }
    }
}

static long up(long n, long unit) { return (n + unit - 1) / unit * unit; }

/* Copy T rows of one head (`stride` apart) into `to` (rows of `width`), zeros to `padded` rows. */
static void gather(const float *x, long T, long padded, long stride, long width, float *to) {
    for (long t = 0; t < T; t++) memcpy(to + t * width, x + t * stride, sizeof(float) * width);
    memset(to + T * width, 0, sizeof(float) * (padded - T) * width);
}

static void transpose(const float *x, long rows, long columns, float *to, long stride) {
    for (long r = 0; r < rows; r += 16)
        for (long c = 0; c < columns; c++)
            for (long i = r; i < r + 16; i++) to[c * stride + i] = x[i * columns + c];
}

/* Scores of `many` queries from `first` on become weights; those of later keys become zero.
 * With `begin`, nothing is normalised: the weights are e^(score - lse) of a row already known. */
static void soften(float *S, long stride, long first, long many, long seen, float scale, float *lse,
                   int known) {
    for (long i = 0; i < many; i++) {
        float *row = S + i * stride, most = -INFINITY, sum = 0;
        long mine = first + i + 1;
        if (known) {
            float base = lse[i];
#pragma omp simd
            for (long k = 0; k < mine; k++) row[k] = exp_(row[k] * scale - base);
        } else {
#pragma omp simd reduction(max : most)
            for (long k = 0; k < mine; k++) most = row[k] > most ? row[k] : most;
            most *= scale;
#pragma omp simd reduction(+ : sum)
            for (long k = 0; k < mine; k++) sum += row[k] = exp_(row[k] * scale - most);
            float share = 1 / sum;
#pragma omp simd
            for (long k = 0; k < mine; k++) row[k] *= share;
            lse[i] = most + logf(sum);
        }
        memset(row + mine, 0, sizeof(float) * (seen - mine));
    }
}

/* q, y: B × T × N × H; k, v: B × T × K × H; lse: B × N × up(T, 64). H is a multiple of 16. */
void attention_forward(const float *q, const float *k, const float *v, long B, long T, long N,
                       long K, long H, float scale, float *y, float *lse, int threads) {
    // Rows a power of two apart would share a few lines of the cache.
    long padded = up(T, GROUP), wide = padded + 16, share = N / K;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long task = 0; task < B * K; task++) {
        long b = task / K, kv = task % K;
        float *room = aligned_alloc(
            64, sizeof(float) * (2 * padded * H + wide * H + GROUP * wide + 2 * GROUP * H));
        float *keys = room, *turned = keys + padded * H, *values = turned + wide * H;
        float *S = values + padded * H, *queries = S + GROUP * wide, *out = queries + GROUP * H;
        gather(k + (b * T * K + kv) * H, T, padded, K * H, H, keys);
        gather(v + (b * T * K + kv) * H, T, padded, K * H, H, values);
        transpose(keys, padded, H, turned, wide);
        for (long n = kv * share; n < (kv + 1) * share; n++)
            for (long first = 0; first < T; first += GROUP) {
                long many = T - first < GROUP ? T - first : GROUP, seen = first + GROUP;
                gather(q + ((b * T + first) * N + n) * H, many, GROUP, N * H, H, queries);
                product(queries, H, 1, turned, wide, GROUP, seen, H, 0, S, wide);
                soften(S, wide, first, GROUP, seen, scale, lse + (b * N + n) * padded + first, 0);
                product(S, wide, 1, values, H, GROUP, H, seen, 0, out, H);
                for (long i = 0; i < many; i++)
                    memcpy(y + ((b * T + first + i) * N + n) * H, out + i * H, sizeof(float) * H);
            }
        free(room);
    }
}

/* The weights P are computed again from lse. With D = Σ dy·y per query, dS = P · (dy vᵀ - D):
 * dq = scale · dS k, dk = scale · dSᵀ q, dv = Pᵀ dy. */
void attention_backward(const float *q, const float *k, const float *v, const float *y,
                        const float *lse, const float *dy, long B, long T, long N, long K, long H,
                        float scale, float *dq, float *dk, float *dv, int threads) {
    // Rows a power of two apart would share a few lines of the cache.
    long padded = up(T, GROUP), wide = padded + 16, share = N / K;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long task = 0; task < B * K; task++) {
        long b = task / K, kv = task % K, one = padded * H;
        float *room = aligned_alloc(
            64, sizeof(float) * (4 * one + 2 * wide * H + 2 * GROUP * wide + 4 * GROUP * H));
        float *keys = room, *keys_turned = keys + one, *values = keys_turned + wide * H;
        float *values_turned = values + one, *dkeys = values_turned + wide * H;
        float *dvalues = dkeys + one, *P = dvalues + one, *dS = P + GROUP * wide;
        float *queries = dS + GROUP * wide;
        float *out = queries + GROUP * H, *dout = out + GROUP * H, *dqueries = dout + GROUP * H;
        gather(k + (b * T * K + kv) * H, T, padded, K * H, H, keys);
        gather(v + (b * T * K + kv) * H, T, padded, K * H, H, values);
        transpose(keys, padded, H, keys_turned, wide);
        transpose(values, padded, H, values_turned, wide);
        memset(dkeys, 0, sizeof(float) * 2 * one);
        for (long n = kv * share; n < (kv + 1) * share; n++)
            for (long first = 0; first < T; first += GROUP) {
                long many = T - first < GROUP ? T - first : GROUP, seen = first + GROUP;
                long at = ((b * T + first) * N + n) * H;
                gather(q + at, many, GROUP, N * H, H, queries);
                gather(y + at, many, GROUP, N * H, H, out);
                gather(dy + at, many, GROUP, N * H, H, dout);
                product(queries, H, 1, keys_turned, wide, GROUP, seen, H, 0, P, wide);
                float *known = (float *)lse + (b * N + n) * padded + first;
                soften(P, wide, first, GROUP, seen, scale, known, 1);
                product(dout, H, 1, values_turned, wide, GROUP, seen, H, 0, dS, wide);
                for (long i = 0; i < GROUP; i++) {
                    float D = 0, *row = dS + i * wide, *weight = P + i * wide;
#pragma omp simd reduction(+ : D)
                    for (long h = 0; h < H; h++) D += out[i * H + h] * dout[i * H + h];
#pragma omp simd
                    for (long s = 0; s < seen; s++) row[s] = weight[s] * (row[s] - D) * scale;
                }
                product(dS, wide, 1, keys, H, GROUP, H, seen, 0, dqueries, H);
                product(dS, 1, wide, queries, H, seen, H, GROUP, 1, dkeys, H);
                product(P, 1, wide, dout, H, seen, H, GROUP, 1, dvalues, H);
                for (long i = 0; i < many; i++)
                    memcpy(dq + at + i * N * H, dqueries + i * H, sizeof(float) * H);
            }
        for (long t = 0; t < T; t++) {
            memcpy(dk + ((b * T + t) * K + kv) * H, dkeys + t * H, sizeof(float) * H);
            memcpy(dv + ((b * T + t) * K + kv) * H, dvalues + t * H, sizeof(float) * H);
        }
        free(room);
    }
}
