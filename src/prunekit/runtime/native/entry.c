/* What is called from outside: which kernels run here, a product, a dense stretch of rows. Plain C symbols, nothing of Python's or torch's.

   Threads are those of the OpenMP library that torch has loaded, called by the entry compilers use (GOMP_parallel): a pool of our own
   would wait for processors on which torch's threads spin. Rows are cut into stretches with about as many bytes each, and whoever is
   free takes the next. */

#include "packed.h"
#include <pthread.h>
#include <stdlib.h>

enum { INTERFACE = 2, SMALLEST_PART = 16 << 10, LARGEST_PART = 256 << 10, PARTS_PER_THREAD = 4 };

typedef void (*Parallel)(void (*)(void *), void *, unsigned threads, unsigned flags);

static Parallel parallel;
uint8_t places[256][16];

static void forked(void)
{
    parallel = NULL; /* the threads stayed behind in the parent */
}

__attribute__((constructor)) static void prepare(void)
{
    for (int byte = 0; byte < 256; byte++)
        for (int bit = 0, number = 0; bit < 8; bit++) {
            const int there = byte >> bit & 1;
            places[byte][2 * bit] = (uint8_t)(there ? 2 * number : 0x80);
            places[byte][2 * bit + 1] = (uint8_t)(there ? 2 * number + 1 : 0x80);
            number += there;
        }
    pthread_atfork(NULL, NULL, forked);
}

int prunekit_interface(void)
{
    return INTERFACE;
}

/* the entry of an OpenMP library, or NULL for one thread */
void prunekit_set_parallel(void *entry)
{
    parallel = (Parallel)entry;
}

void in_threads(void (*work)(void *), void *data, int threads)
{
    const Parallel start = parallel;
    if (start && threads > 1)
        start(work, data, (unsigned)threads, 0);
    else
        work(data);
}

int prunekit_has(int level)
{
    switch (level) {
    case PORTABLE: return 1;
#if defined(__x86_64__)
    case AVX2:
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case AVX512:
        return prunekit_has(AVX2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi2");
    case AVX512_BF16: return prunekit_has(AVX512) && __builtin_cpu_supports("avx512bf16");
#elif defined(__aarch64__)
    case NEON: return 1;
#endif
    default: return 0;
    }
}

static const Kernels *kernels_of(int level)
{
    switch (level) {
#if defined(__x86_64__)
    case AVX2: return &avx2_kernels;
    case AVX512:
    case AVX512_BF16: return &avx512_kernels;
#elif defined(__aarch64__)
    case NEON: return &neon_kernels;
#endif
    default: return &portable_kernels;
    }
}

typedef struct {
    const Product *product; /* NULL: expand */
    const Matrix *matrix;
    Multiply multiply;
    Expand expand;
    char *out;
    int64_t begin, end, itemsize, parts, next;
} Work;

/* bytes of the rows before this one */
static int64_t bytes_before(const Work *work, int64_t row)
{
    return work->matrix->offsets[row] * work->itemsize + row * work->matrix->words * 8;
}

static int64_t start_of_part(const Work *work, int64_t part)
{
    const int64_t from = bytes_before(work, work->begin), all = bytes_before(work, work->end) - from;
    const int64_t wanted = from + all / work->parts * part;
    int64_t low = work->begin, high = work->end;
    if (part == work->parts)
        return work->end;
    while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        if (bytes_before(work, middle) < wanted)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static void take_parts(void *data)
{
    Work *work = data;
    for (;;) {
        const int64_t part = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED);
        if (part >= work->parts)
            return;
        const int64_t begin = start_of_part(work, part), end = start_of_part(work, part + 1);
        if (begin == end)
            continue;
        if (work->product)
            work->multiply(work->product, begin, end);
        else
            work->expand(
                work->matrix, begin, end, work->out + (begin - work->begin) * work->matrix->columns * work->itemsize);
    }
}

static void run(Work *work, int threads)
{
    const int64_t bytes = bytes_before(work, work->end) - bytes_before(work, work->begin);
    int64_t part = bytes / ((int64_t)threads * PARTS_PER_THREAD);
    part = part < SMALLEST_PART ? SMALLEST_PART : part > LARGEST_PART ? LARGEST_PART : part;
    work->parts = bytes / part + 1;
    in_threads(take_parts, work, work->parts < threads ? (int)work->parts : threads);
}

/* Returns 0, or 1 where there is no memory for a copy of x. `level` must be one this processor has; `dtype` is that of the values. x is
   [batch][columns], contiguous, of float32, or bfloat16 at AVX512_BF16 with values in bfloat16; y [batch][rows] and bias likewise. */
int prunekit_multiply(
    int level, int dtype, int threads, int x_is_bfloat16, int64_t rows, int64_t columns, const unsigned char *mask,
    const void *values, const int64_t *offsets, const void *bias, int64_t batch, const void *x, void *y)
{
    const int64_t words = (columns + WORD - 1) / WORD;
    Product product = {{rows, columns, words, mask, values, offsets}, batch, columns, x, bias, y};
    Work work = {.product = &product, .matrix = &product.matrix, .end = rows, .itemsize = dtype == FLOAT32 ? 4 : 2};
    void *copy = NULL;
    work.multiply = kernels_of(level)->multiply[dtype];
#if defined(__x86_64__)
    if (x_is_bfloat16)
        work.multiply = bfloat16_dot;
#endif
    if (columns % WORD) { /* kernels read whole words */
        const size_t size = x_is_bfloat16 ? 2 : 4, line = (size_t)columns * size;
        copy = calloc((size_t)(batch * words * WORD), size);
        if (!copy)
            return 1;
        for (int64_t row = 0; row < batch; row++)
            memcpy((char *)copy + (size_t)(row * words * WORD) * size, (const char *)x + (size_t)row * line, line);
        product.x = copy;
        product.stride = words * WORD;
    }
    run(&work, threads);
    free(copy);
    return 0;
}

/* Rows begin .. end as they would be dense, [end - begin][columns] of the dtype of the values. */
void prunekit_expand(
    int level, int dtype, int threads, int64_t columns, const unsigned char *mask, const void *values,
    const int64_t *offsets, int64_t begin, int64_t end, void *out)
{
    const Matrix matrix = {end, columns, (columns + WORD - 1) / WORD, mask, values, offsets};
    Work work = {.matrix = &matrix, .expand = kernels_of(level)->expand[dtype], .out = out, .begin = begin, .end = end};
    work.itemsize = dtype == FLOAT32 ? 4 : 2;
    run(&work, threads);
}
