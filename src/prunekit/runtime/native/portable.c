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

#define MULTIPLY(NAME, VALUE, FLOAT)                                                                                 \
    static void NAME(const Product *product, int64_t begin, int64_t end)                                             \
    {                                                                                                                \
        const Matrix *matrix = &product->matrix;                                                                     \
        for (int64_t first = 0; first < product->batch; first += MOST_ROWS) {                                        \
            const int64_t left = product->batch - first, count = left < MOST_ROWS ? left : MOST_ROWS;                \
            const float *x = (const float *)product->x + first * product->stride;                                    \
            float *y = (float *)product->y + first * matrix->rows;                                                   \
            for (int64_t row = begin; row < end; row++) {                                                            \
                const VALUE *values = (const VALUE *)matrix->values + matrix->offsets[row];                          \
                float sums[MOST_ROWS] = {0};                                                                         \
                for (int64_t word = 0; word < matrix->words; word++)                                                 \
                    for (uint64_t bits = word_at(matrix->mask, row * matrix->words + word); bits; bits &= bits - 1) { \
                        const float value = FLOAT(*values++);                                                        \
                        const float *column = x + word * WORD + __builtin_ctzll(bits);                               \
                        for (int64_t i = 0; i < count; i++)                                                          \
                            sums[i] += value * column[i * product->stride];                                          \
                    }                                                                                                \
                for (int64_t i = 0; i < count; i++)                                                                  \
                    y[i * matrix->rows + row] = sums[i] + (product->bias ? ((const float *)product->bias)[row] : 0); \
            }                                                                                                        \
        }                                                                                                            \
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
