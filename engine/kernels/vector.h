/* As many numbers at a time as a register holds, in the compiler's own vector types: 16 with
 * AVX-512, 8 with AVX2, 4 with NEON. Wider types than the processor's would live in memory.
 *
 * Only what those types cannot say is written once per processor, as single instructions: dot
 * products of bytes, and half precision. (The headers of intrinsics take longer to read than a
 * product to compile.) Every function here works lane by lane, or adds up lanes in one fixed order,
 * so a result never depends on what else is computed beside it.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512VNNI__)
#define LANES 16
#elif defined(__AVX2__) && defined(__F16C__)
#define LANES 8
#else
#define LANES 4
#endif
#if LANES == 16 || defined(__aarch64__)
enum { REGISTERS = 32 };
#else
enum { REGISTERS = 16 };
#endif
#define VECTOR(type) type __attribute__((vector_size(LANES * sizeof(type))))
typedef VECTOR(float) vec;
typedef VECTOR(int32_t) ivec;
typedef VECTOR(uint16_t) halves;
typedef VECTOR(int8_t) narrow;

#define INLINE static inline __attribute__((always_inline))
#define APART static __attribute__((noinline, unused))  /* rare: compiled once, not at every use */
/* A loop over constants, laid out in full, so that what it indexes stays in registers. */
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
#define EACH(i, n) UNROLL for (int i = 0; i < n; i++)

/* The lanes in order, but for those n apart, which change places. */
#define AWAY(i, n) ((i) ^ n) % LANES
#define QUAD(i, n) AWAY(i, n), AWAY(i + 1, n), AWAY(i + 2, n), AWAY(i + 3, n)
#if LANES == 16
#define ACROSS(n) QUAD(0, n), QUAD(4, n), QUAD(8, n), QUAD(12, n)
#elif LANES == 8
#define ACROSS(n) QUAD(0, n), QUAD(4, n)
#else
#define ACROSS(n) QUAD(0, n)
#endif
static const ivec LANE = {ACROSS(0)};  /* 0, 1, 2 … */

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
#if LANES > 4  /* which compilers do not find by themselves */
    __asm__("vmaxps %2, %1, %0" : "=v"(b) : "v"(a), "v"(b));
    return b;
#else
    return choose(a > b, a, b);
#endif
}
INLINE vec magnitude(vec v) { return (vec)((ivec)v & 0x7fffffff); }
/* To the nearest integer, for magnitudes below 2^22: adding 1.5 * 2^23 drops the fraction. */
INLINE vec nearest(vec v) { vec magic = all(12582912.0f); return (v + magic) - magic; }

/* The first n of LANES numbers, zeros for the others. */
APART vec load_part(const float *p, long n) {
    float some[LANES] = {0};
    if (n > 0) memcpy(some, p, n * sizeof(float));
    return load(some);
}
INLINE vec load_some(const float *p, long n) { return n >= LANES ? load(p) : load_part(p, n); }
APART void store_part(float *p, vec v, long n) { if (n > 0) memcpy(p, &v, n * sizeof(float)); }
INLINE void store_some(float *p, vec v, long n) {
    if (n >= LANES) store(p, v);
    else store_part(p, v, n);
}
/* The first n lanes, zeros for the others. */
INLINE vec only(vec v, long n) {
    return (vec)((ivec)v & (LANE < (int32_t)(n < LANES ? n : LANES)));
}

#define SWAP(v, n) __builtin_shufflevector(v, v, ACROSS(n))
#define FOLD(v, how)                                                                             \
    if (LANES > 8) v = how(v, SWAP(v, 8));                                                       \
    if (LANES > 4) v = how(v, SWAP(v, 4));                                                       \
    v = how(v, SWAP(v, 2));                                                                      \
    v = how(v, SWAP(v, 1));
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
    vec v;
    halves h;
    memcpy(&h, p, sizeof h);
#if defined(__F16C__)
    __asm__("vcvtph2ps %1, %0" : "=v"(v) : "v"(h));
#elif defined(__aarch64__)
    __asm__("fcvtl %0.4s, %1.4h" : "=w"(v) : "w"(h));
#else
    _Float16 some[LANES];
    memcpy(some, &h, sizeof some);
    for (int i = 0; i < LANES; i++) v[i] = some[i];
#endif
    return v;
}
INLINE uint16_t to_half(float x) {
    x = x > 65504 ? 65504 : x < -65504 ? -65504 : x;
    uint16_t bits;
#if defined(__F16C__)
    typedef int32_t four __attribute__((vector_size(16)));
    four half;
    __asm__("vcvtps2ph $0, %1, %0" : "=x"(half) : "x"(x));
    bits = half[0];
#else
    _Float16 half = x;
    memcpy(&bits, &half, 2);
#endif
    return bits;
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
    halves h;
    memcpy(&h, p, sizeof h);
#if LANES > 4  /* gcc 12 would do it in halves */
    ivec wide;
    __asm__("vpmovzxwd %1, %0" : "=v"(wide) : "v"(h));
    return (vec)(wide << 16);
#else
    return (vec)(__builtin_convertvector(h, ivec) << 16);
#endif
}

/* Each of LANES sums goes on by 4 products of bytes of w and of x, which all of them share.
 *
 * `dot_small` takes w in 0 … 15. `dot` takes w with 128 added, and its sum must begin with
 * `begin(s)`, s being the sum of all x: some instructions want one unsigned factor, so there the
 * products are 128 · x too large.
 */
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#if LANES == 16
#define DOT "vpdpbusd"
#else
#define DOT "%{vex%} vpdpbusd"
#endif
INLINE ivec dot(ivec acc, ivec w, int32_t x) {
    __asm__(DOT " %2, %1, %0" : "+v"(acc) : "v"(w), "v"(all_int(x)));
    return acc;
}
INLINE ivec dot_small(ivec acc, ivec w, int32_t x) { return dot(acc, w, x); }
INLINE ivec begin(int32_t s) { return all_int(-128 * s); }
#else
#if LANES == 8
INLINE ivec dot_small(ivec acc, ivec w, int32_t x) {
    ivec pairs;
    __asm__("vpmaddubsw %2, %1, %0" : "=x"(pairs) : "x"(w), "x"(all_int(x)));
    __asm__("vpmaddwd %1, %0, %0" : "+x"(pairs) : "x"(all_int(0x00010001)));
    return acc + pairs;
}
INLINE ivec dot_signed(ivec acc, ivec w, int32_t x) {
    ivec size, factor, pairs;
    __asm__("vpabsb %1, %0" : "=x"(size) : "x"(w));
    __asm__("vpsignb %2, %1, %0" : "=x"(factor) : "x"(all_int(x)), "x"(w));
    __asm__("vpmaddubsw %2, %1, %0" : "=x"(pairs) : "x"(size), "x"(factor));
    __asm__("vpmaddwd %1, %0, %0" : "+x"(pairs) : "x"(all_int(0x00010001)));
    return acc + pairs;
}
#elif defined(__ARM_FEATURE_DOTPROD)
INLINE ivec dot_signed(ivec acc, ivec w, int32_t x) {
    __asm__("sdot %0.4s, %1.16b, %2.16b" : "+w"(acc) : "w"(w), "w"(all_int(x)));
    return acc;
}
#elif defined(__aarch64__)
INLINE ivec dot_signed(ivec acc, ivec w, int32_t x) {
    ivec low, high, factor = all_int(x);  /* two products below 128² fit 16 bits */
    __asm__("smull %0.8h, %1.8b, %2.8b" : "=w"(low) : "w"(w), "w"(factor));
    __asm__("smull2 %0.8h, %1.16b, %2.16b" : "=w"(high) : "w"(w), "w"(factor));
    __asm__("addp %0.8h, %0.8h, %1.8h" : "+w"(low) : "w"(high));
    __asm__("sadalp %0.4s, %1.8h" : "+w"(acc) : "w"(low));
    return acc;
}
#else
INLINE ivec dot_signed(ivec acc, ivec w, int32_t x) {
    int8_t ours[LANES * 4], factor[4];
    memcpy(ours, &w, sizeof w);
    memcpy(factor, &x, 4);
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < 4; j++) acc[i] += ours[4 * i + j] * factor[j];
    return acc;
}
#endif
#if LANES != 8
INLINE ivec dot_small(ivec acc, ivec w, int32_t x) { return dot_signed(acc, w, x); }
#endif
INLINE ivec dot(ivec acc, ivec w, int32_t x) { return dot_signed(acc, w ^ (int32_t)0x80808080, x); }
INLINE ivec begin(int32_t s) { (void)s; return all_int(0); }
#endif
