/* Plain C: the same products, one value after the other. */

#include "packed.h"

static inline float float_of_float16(uint16_t bits)
{
    const uint32_t sign = (uint32_t)(bits & 0x8000) << 16;
    const uint32_t rest = bits & 0x7fff;
    uint32_t wide;
    float value;
    if (rest >= 0x7c00) {
        wide = sign | 0x7f800000 | (rest & 0x3ff) << 13;
        memcpy(&value, &wide, 4);
    } else {
        /* as if it were a float whose exponent is 112 too small; subnormal ones come out right, too */
        wide = rest << 13;
        memcpy(&value, &wide, 4);
        value *= 0x1p112f;
        memcpy(&wide, &value, 4);
        wide |= sign;
        memcpy(&value, &wide, 4);
    }
    return value;
}

static inline float float_of_float32(float value)
{
    return value;
}

/* Ones of a mask are taken two by two: sums that wait for themselves are what takes the time. Many rows of x are not for this level, which
   expands as fast as it multiplies. */
#define TERM(FLOAT) FLOAT(*values++) * x[word * WORD + __builtin_ctzll(bits)]
#define MULTIPLY(NAME, VALUE, FLOAT)                                                                         \
    static void NAME(const Product *product, int64_t begin, int64_t end)                                     \
    {                                                                                                        \
        const Matrix *matrix = &product->matrix;                                                             \
        for (int64_t i = 0; i < product->batch; i++) {                                                       \
            const float *x = (const float *)product->x + i * product->stride;                                \
            float *y = (float *)product->y + i * matrix->rows;                                               \
            const VALUE *values = (const VALUE *)matrix->values + matrix->offsets[begin];                    \
            for (int64_t row = begin; row < end; row++) {                                                    \
                float even = product->bias ? ((const float *)product->bias)[row] : 0, odd = 0;               \
                for (int64_t word = 0; word < matrix->words; word++) {                                       \
                    uint64_t bits = word_at(matrix->mask, row * matrix->words + word);                       \
                    for (int left = __builtin_popcountll(bits); left > 1; left -= 2, bits &= bits - 1) {     \
                        even += TERM(FLOAT);                                                                 \
                        bits &= bits - 1;                                                                    \
                        odd += TERM(FLOAT);                                                                  \
                    }                                                                                        \
                    if (bits)                                                                                \
                        even += TERM(FLOAT);                                                                 \
                }                                                                                            \
                y[row] = even + odd;                                                                         \
            }                                                                                                \
        }                                                                                                    \
    }

MULTIPLY(multiply_float32, float, float_of_float32)
MULTIPLY(multiply_float16, uint16_t, float_of_float16)
MULTIPLY(multiply_bfloat16, uint16_t, float_of_bfloat16)

#define EXPAND(NAME, VALUE)                                                                                         \
    static void NAME(const Matrix *matrix, int64_t begin, int64_t end, void *out)                                   \
    {                                                                                                               \
        const VALUE *values = (const VALUE *)matrix->values + matrix->offsets[begin];                               \
        memset(out, 0, (size_t)((end - begin) * matrix->columns) * sizeof(VALUE));                                  \
        for (int64_t row = begin; row < end; row++)                                                                 \
            for (int64_t word = 0; word < matrix->words; word++)                                                    \
                for (uint64_t bits = word_at(matrix->mask, row * matrix->words + word); bits; bits &= bits - 1)     \
                    ((VALUE *)out)[(row - begin) * matrix->columns + word * WORD + __builtin_ctzll(bits)] = *values++; \
    }

EXPAND(expand16, uint16_t)
EXPAND(expand32, float)

const Kernels portable_kernels = {
    .multiply = {[FLOAT32] = multiply_float32, [FLOAT16] = multiply_float16, [BFLOAT16] = multiply_bfloat16},
    .expand = {[FLOAT32] = expand32, [FLOAT16] = expand16, [BFLOAT16] = expand16},
};
