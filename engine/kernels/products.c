/* Matrix products in 8 bits for training: C = L Rᵀ, exact in 32-bit integers, scaled back to fp32.
 *
 * A factor is a matrix of lanes × depth, where depth is what the product sums over. `weave` rounds
 * an fp32 matrix to 8 bits and lays it out so that one 64-byte load holds 4 consecutive steps of
 * depth for 16 lanes, which is what the VNNI instruction eats:
 *
 *     woven[lane / 16][step / 4][lane % 16][step % 4]
 *
 * The same matrix serves in two ways, and one pass over it can write both:
 *     rows as lanes (depth = columns): x and W in x Wᵀ; each row has a scale of its own
 *     columns as lanes (depth = rows): x in dyᵀ x;      each BLOCK of rows has a scale
 * The instruction multiplies unsigned by signed bytes. Left factors are stored with 128 added, and
 * what that adds to every product, 128 · sum(right lane), is where the accumulators begin.
 */

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

enum { LANES = 16, DEEP = 4, BLOCK = 256, CHUNK = 64, HEIGHT = 8, WIDTH = 3, FINER = 254 };

static long up(long n, long unit) { return (n + unit - 1) / unit; }

static __mmask16 first_of(long n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }

/* The largest magnitude. As integers, the bits of NaN are above all others, so it is not lost. */
static float largest(const float *x, long n) {
    __m512i most = _mm512_setzero_si512();
    for (long i = 0; i < n; i += 16) {
        __m512i bits = _mm512_maskz_loadu_epi32(first_of(n - i), x + i);
        most = _mm512_max_epu32(most, _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)));
    }
    uint32_t bits = _mm512_reduce_max_epu32(most);
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static float inverse_of(float most) { return most > 0 ? 127 / most : 0; }

static float scale_of(float most, int digit) { return digit == 2 ? most / 127 / FINER : most / 127; }

/* Round 16 numbers, those beyond `n` as zeros. The second digit is what the first one left over. */
static inline __m512i rounded(const float *x, long n, float inverse, int digit) {
    __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(first_of(n), x), _mm512_set1_ps(inverse));
    if (digit == 2) {
        v = _mm512_sub_ps(v, _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
        v = _mm512_mul_ps(v, _mm512_set1_ps(FINER));
    }
    return _mm512_cvtps_epi32(v);
}

/* Lanes are 16 of the rows. */
static void weave_row_panel(const float *x, long rows, long columns, int digit, uint8_t flip,
                            const float *most, uint8_t *out, float *scale, int32_t *sums) {
    long steps = up(columns, DEEP);
    __m128i flips = _mm_set1_epi8((char)flip);
    for (long lane = 0; lane < LANES; lane++) {
        const float *row = x + lane * columns;
        uint32_t *to = (uint32_t *)out + lane;
        if (lane >= rows) {
            for (long t = 0; t < steps; t++) to[t * LANES] = flip * 0x01010101u;
            continue;
        }
        float inverse = inverse_of(most[lane]);
        __m512i sum = _mm512_setzero_si512();
        for (long c = 0; c < columns; c += 16) {
            __m512i q = rounded(row + c, columns - c, inverse, digit);
            sum = _mm512_add_epi32(sum, q);
            uint32_t words[4];
            _mm_storeu_si128((__m128i *)words, _mm_xor_si128(_mm512_cvtsepi32_epi8(q), flips));
            long t = c / DEEP, many = steps - t < 4 ? steps - t : 4;
            for (long i = 0; i < many; i++) to[(t + i) * LANES] = words[i];
        }
        scale[lane] = scale_of(most[lane], digit);
        if (sums) sums[lane] = -128 * _mm512_reduce_add_epi32(sum);
    }
}

/* Lanes are the columns; these are the steps of one block of rows. */
static void weave_column_block(const float *x, long rows, long columns, int digit, uint8_t flip,
                               float most, uint8_t *out, long panel_bytes, int32_t *sums) {
    float inverse = inverse_of(most);
    __m512i flips = _mm512_set1_epi8((char)flip), low = _mm512_set1_epi32(255);
    for (long c = 0; c < columns; c += LANES) {
        __m512i sum = _mm512_setzero_si512();
        uint8_t *to = out + c / LANES * panel_bytes;
        for (long r = 0; r < rows; r += DEEP, to += LANES * DEEP) {
            __m512i word = _mm512_setzero_si512();
            for (long i = 0; i < DEEP && r + i < rows; i++) {
                __m512i q = rounded(x + (r + i) * columns + c, columns - c, inverse, digit);
                sum = _mm512_add_epi32(sum, q);
                word = _mm512_or_si512(word, _mm512_sllv_epi32(_mm512_and_si512(q, low),
                                                               _mm512_set1_epi32(8 * i)));
            }
            _mm512_storeu_si512(to, _mm512_xor_si512(word, flips));
        }
        sum = _mm512_mullo_epi32(sum, _mm512_set1_epi32(-128));
        if (sums) _mm512_mask_storeu_epi32(sums + c, first_of(columns - c), sum);
    }
}

/* Round x (rows × columns) to 8 bits. Digit 1 is the number itself, digit 2 what that left over.
 *
 * by_row: up(rows, 16) × up(columns, 4) × 64 bytes, with `row_scale` and
 * `row_sums` (rows). by_column: up(columns, 16) × up(rows, 4) × 64 bytes, with `block_scale`
 * (up(rows, 256)) and `block_sums` (up(rows, 256) × columns). Right factors need sums; a result
 * whose sums are NULL is a left factor.
 */
void weave(const float *x, long rows, long columns, long digit, uint8_t *by_row, float *row_scale,
           int32_t *row_sums, uint8_t *by_column, float *block_scale, int32_t *block_sums,
           int threads) {
    uint8_t flip_rows = row_sums ? 0 : 0x80, flip_columns = block_sums ? 0 : 0x80;
    long panel = up(columns, DEEP) * LANES * DEEP, column_panel = up(rows, DEEP) * LANES * DEEP;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long block = 0; block < up(rows, BLOCK); block++) {
        long first = block * BLOCK, many = rows - first < BLOCK ? rows - first : BLOCK;
        const float *from = x + first * columns;
        float most[BLOCK];
        for (long r = 0; r < many; r++) most[r] = largest(from + r * columns, columns);
        for (long r = 0; r < many; r += LANES)
            weave_row_panel(from + r * columns, many - r, columns, digit, flip_rows, most + r,
                            by_row + (first + r) / LANES * panel, row_scale + first + r,
                            row_sums ? row_sums + first + r : NULL);
        float all = largest(most, many);
        weave_column_block(from, many, columns, digit, flip_columns, all,
                           by_column + first / DEEP * LANES * DEEP, column_panel,
                           block_sums ? block_sums + block * columns : NULL);
        block_scale[block] = scale_of(all, digit);
    }
}

/* One tile: HEIGHT left lanes × up to WIDTH panels of right lanes, over `steps` groups of depth. */
static inline __attribute__((always_inline)) void tile(
    const int width, const uint8_t *left, const uint8_t *right, long right_panel, long steps,
    const int32_t *sums, const float *left_scale, const float *right_scale, float factor, int add,
    float *C, long C_stride, long height, long columns) {
    __m512i acc[HEIGHT][WIDTH];
    __mmask16 mask[WIDTH];
#pragma GCC unroll 3
    for (int j = 0; j < width; j++) {
        mask[j] = first_of(columns - j * LANES);
        __m512i begin = _mm512_maskz_loadu_epi32(mask[j], sums + j * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < HEIGHT; i++) acc[i][j] = begin;
    }
    for (int i = 0; i < HEIGHT; i++)
        for (int j = 0; j < width; j++) __builtin_prefetch(C + i * C_stride + j * LANES, 1);
    for (long t = 0; t < steps; t++) {
        __m512i r[WIDTH];
#pragma GCC unroll 3
        for (int j = 0; j < width; j++)
            r[j] = _mm512_loadu_si512(right + j * right_panel + t * LANES * DEEP);
#pragma GCC unroll 8
        for (int i = 0; i < HEIGHT; i++) {
            __m512i l = _mm512_set1_epi32(*(const int32_t *)(left + t * LANES * DEEP + i * DEEP));
#pragma GCC unroll 3
            for (int j = 0; j < width; j++)
                __asm__("vpdpbusd %2, %1, %0" : "+v"(acc[i][j]) : "v"(l), "v"(r[j]));
        }
    }
#pragma GCC unroll 3
    for (int j = 0; j < width; j++) {
        __m512 by = _mm512_maskz_loadu_ps(mask[j], right_scale + j * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < HEIGHT; i++) {
            __mmask16 here = i < height ? mask[j] : 0;
            float *to = C + i * C_stride + j * LANES;
            __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(acc[i][j]), by);
            __m512 by_left = _mm512_set1_ps(i < height ? left_scale[i] * factor : 0);
            __m512 before = add ? _mm512_maskz_loadu_ps(here, to) : _mm512_setzero_ps();
            _mm512_mask_storeu_ps(to, here, _mm512_fmadd_ps(y, by_left, before));
        }
    }
}

/* C (M × N) = or += left (M lanes) · right (N lanes), both woven, over `depth` numbers.
 *
 * Every `block` of depth is scaled by its own `block_scale` (a multiple of 4, or all of depth at
 * once) and sums hold one row of N for each; then come the scales of the lanes.
 */
void multiply(const uint8_t *left, const uint8_t *right, long M, long N, long depth, long block,
              const float *left_scale, const float *right_scale, const float *block_scale,
              const int32_t *sums, int add, float *C, long C_stride, int threads) {
    long panel = up(depth, DEEP) * LANES * DEEP;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long chunk = 0; chunk < up(M, CHUNK); chunk++) {
        long first = chunk * CHUNK, last = first + CHUNK < M ? first + CHUNK : M;
        for (long n = 0; n < N; n += WIDTH * LANES) {
            long columns = N - n < WIDTH * LANES ? N - n : WIDTH * LANES;
            for (long k = 0, b = 0; k < depth; k += block, b++) {
                long steps = up(depth - k < block ? depth - k : block, DEEP);
                for (long m = first; m < last; m += HEIGHT) {
                    const uint8_t *l = left + m / LANES * panel + m % LANES * DEEP + k * LANES;
                    const uint8_t *r = right + n / LANES * panel + k * LANES;
                    const int32_t *s = sums + b * N + n;
                    float *to = C + m * C_stride + n;
                    long height = last - m < HEIGHT ? last - m : HEIGHT;
#define TILE(width)                                                                            \
    tile(width, l, r, panel, steps, s, left_scale + m, right_scale + n, block_scale[b],         \
         add || b, to, C_stride, height, columns)
                    if (columns > 2 * LANES) TILE(3);
                    else if (columns > LANES) TILE(2);
                    else TILE(1);
                }
            }
        }
    }
}
