/* The gram matrix of bfloat16 vectors, summed in float32: what calibration spends most of its time on where weights are refitted.

   torch multiplies bfloat16 matrices into bfloat16 ones alone, or turns all into float32 first. Products of two bfloat16 numbers are
   exact in float32, so these are the sums torch takes in float32, in twice as many products an instruction, and of one triangle only. */

#include "packed.h"
#include <stdlib.h>

#if defined(__x86_64__)

#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,avx512bf16,fma,popcnt")))

/* A tile of the matrix, HIGH rows of WIDE vectors, stays in registers while TOKENS tokens are added up. Pairs of tokens lie next to each
   other, as the instruction wants them, in panels of LANES columns. */
enum { LANES = 16, WIDE = 3, HIGH = 8, TOKENS = 512, PANEL = TOKENS / 2 * LANES };

typedef struct {
    const uint16_t *x; /* [tokens][width] */
    float *gram;       /* [width][width] */
    uint32_t *pairs;   /* [panels][TOKENS / 2][LANES] */
    int64_t tokens, width, panels, next;
} Gram;

static __mmask16 columns_from(const Gram *work, int64_t column)
{
    const int64_t left = work->width - column;
    return left >= LANES ? 0xffff : left <= 0 ? 0 : (__mmask16)((1 << left) - 1);
}

TARGET static void pack(const Gram *work, int64_t panel)
{
    const __mmask16 there = columns_from(work, panel * LANES);
    uint32_t *out = work->pairs + panel * PANEL;
    for (int64_t token = 0; token < work->tokens; token += 2, out += LANES) {
        __m256i two[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
        for (int64_t i = 0; i < 2 && token + i < work->tokens && there; i++)
            two[i] = _mm256_maskz_loadu_epi16(there, work->x + (token + i) * work->width + panel * LANES);
        const __m512i upper = _mm512_slli_epi32(_mm512_cvtepu16_epi32(two[1]), 16);
        _mm512_store_si512(out, _mm512_or_si512(_mm512_cvtepu16_epi32(two[0]), upper));
    }
}

TARGET static void add_tile(const Gram *work, int64_t row, int64_t column)
{
    const uint32_t *left = work->pairs + row / LANES * PANEL + row % LANES;
    const uint32_t *right = work->pairs + column / LANES * PANEL;
    __m512 sums[HIGH][WIDE];
    for (int i = 0; i < HIGH; i++)
        for (int j = 0; j < WIDE; j++)
            sums[i][j] = _mm512_setzero_ps();
    for (int64_t token = 0; token < work->tokens; token += 2, left += LANES, right += LANES) {
        __m512bh those[WIDE];
        for (int j = 0; j < WIDE; j++)
            those[j] = (__m512bh)_mm512_load_si512(right + j * PANEL);
        for (int i = 0; i < HIGH; i++) {
            const __m512bh one = (__m512bh)_mm512_set1_epi32((int)left[i]);
            for (int j = 0; j < WIDE; j++)
                sums[i][j] = _mm512_dpbf16_ps(sums[i][j], one, those[j]);
        }
    }
    for (int i = 0; i < HIGH && row + i < work->width; i++)
        for (int j = 0; j < WIDE; j++) {
            const __mmask16 there = columns_from(work, column + j * LANES);
            float *place = work->gram + (row + i) * work->width + column + j * LANES;
            if (there)
                _mm512_mask_storeu_ps(place, there, _mm512_add_ps(_mm512_maskz_loadu_ps(there, place), sums[i][j]));
        }
}

static void pack_panels(void *data)
{
    Gram *work = data;
    for (;;) {
        const int64_t panel = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED);
        if (panel >= work->panels)
            return;
        pack(work, panel);
    }
}

/* the tallest columns of tiles first */
static void add_columns(void *data)
{
    Gram *work = data;
    for (;;) {
        const int64_t column = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED) * WIDE * LANES;
        if (column >= work->width)
            return;
        for (int64_t row = column; row < work->width; row += HIGH)
            add_tile(work, row, column);
    }
}

/* Adds the products of x [tokens][width], bfloat16, with itself to the lower triangle of `gram` [width][width], float32; of what lies above
   it some is added to and some is not. Every sum is taken by one thread in the order of the tokens, so it does not depend on their number.
   Returns 0, or 1 where there is no memory for a copy of TOKENS tokens. For processors with AVX512_BF16. */
int prunekit_add_gram(int threads, int64_t tokens, int64_t width, const void *x, float *gram)
{
    const int64_t panels = (width + WIDE * LANES - 1) / (WIDE * LANES) * WIDE;
    Gram work = {.width = width, .panels = panels, .gram = gram};
    work.pairs = aligned_alloc(64, (size_t)(panels * PANEL) * sizeof *work.pairs);
    if (!work.pairs)
        return 1;
    for (int64_t done = 0; done < tokens; done += TOKENS) {
        work.x = (const uint16_t *)x + done * width;
        work.tokens = tokens - done < TOKENS ? tokens - done : TOKENS;
        work.next = 0;
        in_threads(pack_panels, &work, threads);
        work.next = 0;
        in_threads(add_columns, &work, threads);
    }
    free(work.pairs);
    return 0;
}

#else

int prunekit_add_gram(int threads, int64_t tokens, int64_t width, const void *x, float *gram)
{
    (void)threads, (void)tokens, (void)width, (void)x, (void)gram;
    return 1;
}

#endif
