/* Runs every kernel this processor has on random matrices and compares with sums in double. Buffers end where the library's reading may
   end, so that a sanitizer or an emulator sees a byte too many. Prints how many products each level was tried with. */

#include "packed.h"
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

int prunekit_has(int level);
void prunekit_set_parallel(void *entry);
int prunekit_multiply(
    int level, int dtype, int threads, int x_is_bfloat16, int64_t rows, int64_t columns, const unsigned char *mask,
    const void *values, const int64_t *offsets, const void *bias, int64_t batch, const void *x, void *y);
int prunekit_add_gram(int threads, int64_t tokens, int64_t width, const void *x, float *gram);
void prunekit_expand(
    int level, int dtype, int threads, int64_t columns, const unsigned char *mask, const void *values,
    const int64_t *offsets, int64_t begin, int64_t end, void *out);

static uint64_t state = 1;

static uint64_t draw(uint64_t below)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (state >> 33) % below;
}

typedef struct {
    void (*task)(void *);
    void *data;
} Call;

static void *call(void *given)
{
    ((Call *)given)->task(((Call *)given)->data);
    return NULL;
}

/* what OpenMP does, with threads that live as long as one call */
static void in_parallel(void (*task)(void *), void *data, unsigned threads, unsigned flags)
{
    pthread_t others[8];
    Call given = {task, data};
    (void)flags;
    for (unsigned i = 1; i < threads; i++)
        if (pthread_create(&others[i], NULL, call, &given))
            abort();
    task(data);
    for (unsigned i = 1; i < threads; i++)
        pthread_join(others[i], NULL);
}

/* whole numbers up to 8, which every dtype holds exactly */
static void put(void *to, int dtype, int64_t place, int number)
{
    const float value = (float)number;
    if (dtype == FLOAT32) {
        ((float *)to)[place] = value;
    } else if (dtype == BFLOAT16) {
        ((uint16_t *)to)[place] = bfloat16_of_float(value);
    } else {
        uint32_t bits;
        memcpy(&bits, &value, 4);
        ((uint16_t *)to)[place] = number ? (uint16_t)((bits >> 16 & 0x8000) | (((bits >> 13) - (112u << 10)) & 0x7fff)) : 0;
    }
}

static void *exactly(size_t bytes)
{
    void *memory = malloc(bytes ? bytes : 1);
    if (!memory)
        abort();
    return memory;
}

static int try_one(int level, int dtype, int as_bfloat16, int64_t rows, int64_t columns, int64_t batch, int density)
{
    const int64_t words = (columns + WORD - 1) / WORD;
    const size_t size = dtype == FLOAT32 ? 4 : 2, wide = as_bfloat16 ? 2 : 4;
    const int kind = as_bfloat16 ? BFLOAT16 : FLOAT32;
    unsigned char *memory = exactly((size_t)(rows * words * 8) + 1), *mask = memory + 1; /* masks need not be aligned */
    int *dense = calloc((size_t)(rows * columns) + 1, sizeof *dense), *inputs = exactly((size_t)(batch * columns) * sizeof *inputs);
    int64_t *offsets = exactly((size_t)(rows + 1) * sizeof *offsets), kept = 0;
    memset(mask, 0, (size_t)(rows * words * 8));
    for (int64_t row = 0; row < rows; row++) {
        offsets[row] = kept;
        for (int64_t column = 0; column < columns; column++)
            if ((int)draw(100) < density) {
                dense[row * columns + column] = (int)draw(2) ? 1 + (int)draw(8) : -1 - (int)draw(8);
                mask[row * words * 8 + column / 8] |= (unsigned char)(1 << column % 8);
                kept++;
            }
    }
    offsets[rows] = kept;
    char *values = exactly((size_t)kept * size + PADDING);
    memset(values + (size_t)kept * size, 0xff, PADDING); /* NaN, if it were used */
    for (int64_t i = 0, place = 0; i < rows * columns; i++)
        if (dense[i])
            put(values, dtype, place++, dense[i]);
    char *x = exactly((size_t)(batch * columns) * wide), *bias = exactly((size_t)rows * wide), *y = exactly((size_t)(batch * rows) * wide);
    for (int64_t i = 0; i < batch * columns; i++)
        put(x, kind, i, inputs[i] = (int)draw(17) - 8);
    for (int64_t row = 0; row < rows; row++)
        put(bias, kind, row, (int)row % 5);
    int wrong = prunekit_multiply(level, dtype, 3, as_bfloat16, rows, columns, mask, values, offsets, bias, batch, x, y);
    for (int64_t i = 0; i < batch; i++)
        for (int64_t row = 0; row < rows; row++) {
            double sum = (double)(row % 5);
            for (int64_t column = 0; column < columns; column++)
                sum += (double)dense[row * columns + column] * inputs[i * columns + column];
            const float found = as_bfloat16 ? float_of_bfloat16(((uint16_t *)y)[i * rows + row]) : ((float *)y)[i * rows + row];
            wrong += !(fabs(found - sum) <= (as_bfloat16 ? fabs(sum) / 256 : 0)); /* sums of whole numbers are exact */
        }
    const int64_t begin = rows / 3;
    char *out = exactly((size_t)((rows - begin) * columns) * size), *expected = exactly((size_t)columns * size);
    prunekit_expand(level, dtype, 3, columns, mask, values, offsets, begin, rows, out);
    for (int64_t row = begin; row < rows; row++) {
        for (int64_t column = 0; column < columns; column++)
            put(expected, dtype, column, dense[row * columns + column]);
        wrong += memcmp(expected, out + (size_t)((row - begin) * columns) * size, (size_t)columns * size) != 0;
    }
    free(memory), free(dense), free(inputs), free(offsets), free(values), free(x), free(bias), free(y), free(out), free(expected);
    return wrong;
}

static int try_gram(int64_t tokens, int64_t width)
{
    uint16_t *x = exactly((size_t)(tokens * width) * sizeof *x);
    float *gram = calloc((size_t)(width * width), sizeof *gram);
    int wrong = 0;
    for (int64_t i = 0; i < tokens * width; i++)
        put(x, BFLOAT16, i, (int)draw(17) - 8);
    for (int times = 1; times <= 2; times++) {
        wrong += prunekit_add_gram(3, tokens, width, x, gram);
        for (int64_t row = 0; row < width; row++)
            for (int64_t column = 0; column <= row; column++) {
                double sum = 0;
                for (int64_t token = 0; token < tokens; token++)
                    sum += (double)float_of_bfloat16(x[token * width + row]) * float_of_bfloat16(x[token * width + column]);
                wrong += gram[row * width + column] != times * sum; /* sums of whole numbers are exact */
            }
    }
    free(x), free(gram);
    return wrong;
}

int main(int count, char **words)
{
    static const int densities[] = {0, 1, 40, 50, 95, 100};
    const int tries = count > 1 ? atoi(words[1]) : 40;
    int wrong = 0;
    prunekit_set_parallel((void *)in_parallel);
    for (int level = 0; level < LEVELS; level++) {
        int products = 0;
        if (!prunekit_has(level))
            continue;
        for (int dtype = 0; dtype < DTYPES; dtype++)
            for (int as_bfloat16 = 0; as_bfloat16 <= (level == AVX512_BF16 && dtype == BFLOAT16); as_bfloat16++) {
                for (int i = 0; i < tries; i++, products++)
                    wrong += try_one(
                        level, dtype, as_bfloat16, 1 + (int64_t)draw(40), 1 + (int64_t)draw(200), 1 + (int64_t)draw(20),
                        densities[i % 6]);
                wrong += try_one(level, dtype, as_bfloat16, 200, 700, 3, 60); /* several parts */
                products++;
            }
        if (level == AVX512_BF16) {
            for (int i = 0; i < tries; i++)
                wrong += try_gram(1 + (int64_t)draw(40), 1 + (int64_t)draw(150));
            wrong += try_gram(1025, 50); /* several stretches of tokens */
        }
        printf("%d: %d\n", level, products);
    }
    printf("wrong: %d\n", wrong);
    return wrong != 0;
}
