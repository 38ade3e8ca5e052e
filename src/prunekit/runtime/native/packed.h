/* A packed matrix, a product to be done with it, and what the files of this library share.

   A row is ceil(columns / 64) words of mask, the lowest bit first, and behind `offsets[row]` a value for every bit that is set. Bits
   behind the last column are 0. Kernels read whole vectors of values: up to PADDING bytes behind the last value must be readable. */

#ifndef PRUNEKIT_PACKED_H
#define PRUNEKIT_PACKED_H

#include <stdint.h>
#include <string.h>

enum { FLOAT32, FLOAT16, BFLOAT16, DTYPES };
enum { PORTABLE, AVX2, AVX512, AVX512_BF16, NEON, LEVELS };
enum { WORD = 64, MOST_ROWS = 8, PADDING = 64 };

typedef struct {
    int64_t rows, columns, words;
    const unsigned char *mask; /* [rows][words], any alignment */
    const void *values;        /* float32, float16 or bfloat16 */
    const int64_t *offsets;    /* [rows + 1] */
} Matrix;

/* y[batch][rows] = x[batch][stride] * matrix' + bias. x is float32, or bfloat16 where the kernel is `bfloat16_dot`, and 0 behind the last
   column up to a whole word; y and bias (or NULL) are of the dtype of x. */
typedef struct {
    Matrix matrix;
    int64_t batch, stride;
    const void *x, *bias;
    void *y;
} Product;

/* rows begin .. end of a product, or of the dense matrix [rows][columns] of the values' dtype at `out`, whose first row is `begin` */
typedef void (*Multiply)(const Product *, int64_t begin, int64_t end);
typedef void (*Expand)(const Matrix *, int64_t begin, int64_t end, void *out);

typedef struct {
    Multiply multiply[DTYPES]; /* NULL: the level has none */
    Expand expand[DTYPES];
} Kernels;

extern const Kernels portable_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels, avx512_kernels;
extern const Multiply bfloat16_dot;
#elif defined(__aarch64__)
extern const Kernels neon_kernels;
#endif

/* `work(data)` in so many threads at once, this one among them */
void in_threads(void (*work)(void *), void *data, int threads);

/* for every byte of mask the bytes of eight 16-bit values in their places: where there is none, an index that table look-ups answer with 0 */
extern uint8_t places[256][16];

static inline uint64_t word_at(const unsigned char *mask, int64_t number)
{
    uint64_t word;
    memcpy(&word, mask + 8 * number, 8);
    return word;
}

static inline float float_of_bfloat16(uint16_t bits)
{
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

static inline uint16_t bfloat16_of_float(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000)
        return (uint16_t)(bits >> 16 | 0x40); /* NaN stays NaN */
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#endif
