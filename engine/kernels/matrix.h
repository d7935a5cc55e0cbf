/* Matrices in five formats and the tokens they multiply; `matrix.c` has the products. */

#include "vector.h"

enum { PLAIN32, PLAIN16, BRAIN16, BYTES, NIBBLES };  /* fp32, fp16, bf16, int8, int4 */
enum { PANEL = 16 };  /* rows that lie side by side in int8 and int4 */
enum { GROUP = 64, HALF = 32 };  /* numbers of a row that share a scale in int8, in int4 */

typedef struct {
    int64_t format, rows, columns;
    const void *data, *scale;
    const float *bias;
} matrix;

/* What a product reads: tokens as fp32, or rounded to bytes with the sums that its formats need. */
typedef struct {
    long width;  /* of a token, in numbers, padded with zeros to whole groups */
    float *plain;
    int8_t *bytes;
    float *scale;   /* one for each half group */
    int32_t *sums;  /* of its bytes */
} tokens;

/* The tokens from t on. */
static inline tokens some_tokens(const tokens *x, long t) {
    long halves = x->width / HALF;
    return (tokens){x->width, x->plain + t * x->width, x->bytes + t * x->width,
                    x->scale + t * halves, x->sums + t * halves};
}

static inline int is_plain(const matrix *m) { return m->format < BYTES; }

/* Round 64 numbers of a token, or all of it, to bytes. */
void round_group(const tokens *x, long t, long g);
void round_token(const tokens *x, long t);

/* Rows 16 · unit up to 16 · end of W times the first `many` tokens, bias added: y[token][row]. */
void product(const matrix *m, long unit, long end, const tokens *x, long many, float *y,
             long stride);

/* One row of W as numbers: a token's embedding. */
void look_up(const matrix *m, long row, float *to);
