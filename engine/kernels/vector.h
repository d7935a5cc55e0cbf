/* Sixteen numbers at a time, in the compiler's own vector types: AVX-512, AVX2 or NEON as it can.
 *
 * Only what those types cannot say is written once per processor: dot products of bytes, and half
 * precision. Every function here works lane by lane, or adds up lanes in one fixed order, so a
 * result never depends on what else is computed beside it.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

enum { LANES = 16 };
typedef float vec __attribute__((vector_size(64)));
typedef int32_t ivec __attribute__((vector_size(64)));

#define INLINE static inline __attribute__((always_inline))
/* A loop over constants, laid out in full, so that what it indexes stays in registers. */
#define EACH(i, n) _Pragma("GCC unroll 8") for (int i = 0; i < n; i++)

INLINE long up(long n, long unit) { return (n + unit - 1) / unit; }
INLINE vec all(float x) { return x - (vec){0}; }
INLINE ivec all_int(int32_t x) { return x - (ivec){0}; }
INLINE vec load(const float *p) { vec v; memcpy(&v, p, sizeof v); return v; }
INLINE ivec load_int(const void *p) { ivec v; memcpy(&v, p, sizeof v); return v; }
INLINE void store(float *p, vec v) { memcpy(p, &v, sizeof v); }
INLINE vec to_float(ivec v) { return __builtin_convertvector(v, vec); }
INLINE ivec to_int(vec v) { return __builtin_convertvector(v, ivec); }
INLINE vec choose(ivec mask, vec yes, vec no) {
    return (vec)(((ivec)yes & mask) | ((ivec)no & ~mask));
}
INLINE vec greater(vec a, vec b) {
#if defined(__AVX512F__)  /* which compilers do not find by themselves */
    return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return choose(a > b, a, b);
#endif
}
INLINE vec magnitude(vec v) { return (vec)((ivec)v & 0x7fffffff); }
/* To the nearest integer, for magnitudes below 2^22: adding 1.5 * 2^23 drops the fraction. */
INLINE vec nearest(vec v) { vec magic = all(12582912.0f); return (v + magic) - magic; }

/* The first n of 16 numbers, zeros for the others. */
INLINE vec load_some(const float *p, long n) {
    if (n >= LANES) return load(p);
    float some[LANES] = {0};
    if (n > 0) memcpy(some, p, n * sizeof(float));
    return load(some);
}

INLINE void store_some(float *p, vec v, long n) { memcpy(p, &v, (n < LANES ? n : LANES) * 4); }
/* The first n lanes, zeros for the others. */
INLINE vec only(vec v, long n) {
    const ivec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return (vec)((ivec)v & (lane < (int32_t)(n < LANES ? n : LANES)));
}

#define FOLD(v, how)                                                                             \
    v = how(v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7)); \
    v = how(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11)); \
    v = how(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13)); \
    v = how(v, __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
INLINE vec plus(vec a, vec b) { return a + b; }
INLINE float sum(vec v) { FOLD(v, plus) return v[0]; }
INLINE float largest(vec v) { FOLD(v, greater) return v[0]; }

/* e^x as 2^k · e^r with |r| <= ln 2 / 2, relative error about 1e-7; exactly 1 at 0. */
INLINE vec exponential(vec x) {
    x = greater(x, all(-87.0f));
    x = -greater(-x, all(-88.0f));
    vec k = nearest(x * 1.44269504f);
    vec r = x - k * 0.693359375f + k * 2.12194440e-4f;
    vec p = all(1.0f / 720);
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return (vec)((ivec)p + (to_int(k) << 23));
}
INLINE vec hyperbolic(vec x) { return 1.0f - 2.0f / (exponential(2.0f * x) + 1.0f); }

/* Half precision ↔ fp32. */
INLINE vec load_half(const uint16_t *p) {
#if defined(__AVX512F__)
    return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif defined(__F16C__)
    union { vec v; __m256 half[2]; } u;
    for (int i = 0; i < 2; i++)
        u.half[i] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 8 * i)));
    return u.v;
#else
    vec v;
    _Float16 some[LANES];
    memcpy(some, p, sizeof some);
    for (int i = 0; i < LANES; i++) v[i] = some[i];
    return v;
#endif
}
INLINE uint16_t to_half(float x) {
    x = x > 65504 ? 65504 : x < -65504 ? -65504 : x;
#if defined(__F16C__)
    return _cvtss_sh(x, 0);
#else
    _Float16 half = x;
    uint16_t bits;
    memcpy(&bits, &half, 2);
    return bits;
#endif
}
INLINE float from_half(uint16_t bits) {
    uint16_t some[LANES] = {bits};
    return load_half(some)[0];
}
INLINE float from_brain(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float x;
    memcpy(&x, &wide, 4);
    return x;
}
INLINE vec load_bf16(const uint16_t *p) {
    typedef uint16_t halves __attribute__((vector_size(32)));
    halves h;
    memcpy(&h, p, sizeof h);
    return (vec)(__builtin_convertvector(h, ivec) << 16);
}

/* Each of 16 sums goes on by 4 products of bytes of w and of x, which all 16 share.
 *
 * `dot_small` takes w in 0 … 15. `dot` takes w with 128 added, and its sum must begin with
 * `begin(s)`, s being the sum of all x: the instruction of AVX-512 wants one unsigned factor, so
 * there the products are 128 · x too large.
 */
#if defined(__AVX512VNNI__)
INLINE ivec dot(ivec acc, ivec w, int32_t x) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(all_int(x)));
    return acc;
}
INLINE ivec dot_small(ivec acc, ivec w, int32_t x) { return dot(acc, w, x); }
INLINE ivec begin(int32_t s) { return all_int(-128 * s); }
#else
typedef int8_t bytes __attribute__((vector_size(64)));
#if defined(__AVX2__)
INLINE ivec dot_signed(ivec acc, bytes w, int32_t x) {
    union { ivec v; __m256i half[2]; } a = {acc}, b = {(ivec)w};
    __m256i factor = _mm256_set1_epi32(x), one = _mm256_set1_epi16(1);
    for (int i = 0; i < 2; i++) {
        __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(b.half[i]),
                                             _mm256_sign_epi8(factor, b.half[i]));
        a.half[i] = _mm256_add_epi32(a.half[i], _mm256_madd_epi16(pairs, one));
    }
    return a.v;
}
#elif defined(__ARM_FEATURE_DOTPROD)
INLINE ivec dot_signed(ivec acc, bytes w, int32_t x) {
    union { ivec v; int32x4_t part[4]; } a = {acc};
    union { bytes v; int8x16_t part[4]; } b = {w};
    int8x16_t factor = vreinterpretq_s8_s32(vdupq_n_s32(x));
    for (int i = 0; i < 4; i++) a.part[i] = vdotq_s32(a.part[i], b.part[i], factor);
    return a.v;
}
#else
INLINE ivec dot_signed(ivec acc, bytes w, int32_t x) {
    int8_t factor[4];
    memcpy(factor, &x, 4);
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < 4; j++) acc[i] += w[4 * i + j] * factor[j];
    return acc;
}
#endif
INLINE ivec dot(ivec acc, ivec w, int32_t x) { return dot_signed(acc, (bytes)w ^ -128, x); }
INLINE ivec dot_small(ivec acc, ivec w, int32_t x) { return dot_signed(acc, (bytes)w, x); }
INLINE ivec begin(int32_t s) { (void)s; return all_int(0); }
#endif
