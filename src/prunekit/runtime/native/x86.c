/* AVX-512 (VBMI2, with and without BF16) and AVX2. Which of them a processor has is found out when the library is used, not here. */

#if defined(__x86_64__)

#include "packed.h"
#include <immintrin.h>

/* AVX-512: an expanding move puts the next values where the mask has ones */

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,avx512bf16,fma,popcnt")))
#define NAME bfloat16_dot_kernel
#define VALUE uint16_t
#define X uint16_t
#define LANES 32
#define HEIGHT 2
#define SUMS __m512
#define ZERO _mm512_setzero_ps()
#define ADD _mm512_add_ps
#define TOTAL _mm512_reduce_add_ps
#define ENTRIES __m512i
#define EXPAND(values, bits) _mm512_maskz_expand_epi16((__mmask32)(bits), _mm512_loadu_si512(values))
#define INPUTS __m512i
#define LOAD(x) _mm512_loadu_si512(x)
#define DOT(sums, entries, x) _mm512_dpbf16_ps(sums, (__m512bh)(entries), (__m512bh)(x))
#define FLOAT float_of_bfloat16
#define ROUND bfloat16_of_float
#include "multiply.h"
#undef TARGET

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,fma,popcnt")))
#define SIXTEEN(values, bits) _mm256_maskz_expand_epi16((__mmask16)(bits), _mm256_loadu_si256((const __m256i *)(values)))
#define AS_IS(value) (value)

#define NAME avx512_bfloat16
#define VALUE uint16_t
#define X float
#define LANES 16
#define HEIGHT 2
#define SUMS __m512
#define ZERO _mm512_setzero_ps()
#define ADD _mm512_add_ps
#define TOTAL _mm512_reduce_add_ps
#define ENTRIES __m512
#define EXPAND(values, bits) \
    _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(SIXTEEN(values, bits)), 16))
#define INPUTS __m512
#define LOAD(x) _mm512_loadu_ps(x)
#define DOT(sums, entries, x) _mm512_fmadd_ps(entries, x, sums)
#define FLOAT AS_IS
#define ROUND AS_IS
#include "multiply.h"

#define NAME avx512_float16
#define VALUE uint16_t
#define X float
#define LANES 16
#define HEIGHT 2
#define SUMS __m512
#define ZERO _mm512_setzero_ps()
#define ADD _mm512_add_ps
#define TOTAL _mm512_reduce_add_ps
#define ENTRIES __m512
#define EXPAND(values, bits) _mm512_cvtph_ps(SIXTEEN(values, bits))
#define INPUTS __m512
#define LOAD(x) _mm512_loadu_ps(x)
#define DOT(sums, entries, x) _mm512_fmadd_ps(entries, x, sums)
#define FLOAT AS_IS
#define ROUND AS_IS
#include "multiply.h"

#define NAME avx512_float32
#define VALUE float
#define X float
#define LANES 16
#define HEIGHT 2
#define SUMS __m512
#define ZERO _mm512_setzero_ps()
#define ADD _mm512_add_ps
#define TOTAL _mm512_reduce_add_ps
#define ENTRIES __m512
#define EXPAND(values, bits) _mm512_maskz_expand_ps((__mmask16)(bits), _mm512_loadu_ps(values))
#define INPUTS __m512
#define LOAD(x) _mm512_loadu_ps(x)
#define DOT(sums, entries, x) _mm512_fmadd_ps(entries, x, sums)
#define FLOAT AS_IS
#define ROUND AS_IS
#include "multiply.h"

#define NAME avx512_expand16
#define VALUE uint16_t
#define LANES 32
#define PLACE(out, values, bits) \
    _mm512_storeu_si512(out, _mm512_maskz_expand_epi16((__mmask32)(bits), _mm512_loadu_si512(values)))
#include "expand.h"

#define NAME avx512_expand32
#define VALUE float
#define LANES 16
#define PLACE(out, values, bits) \
    _mm512_storeu_ps(out, _mm512_maskz_expand_ps((__mmask16)(bits), _mm512_loadu_ps(values)))
#include "expand.h"
#undef TARGET

/* AVX2: a shuffle by a table does what the expanding move does, eight entries at a time */

#define TARGET __attribute__((target("avx2,fma,f16c,popcnt")))

TARGET static inline __attribute__((always_inline)) __m128i eight_halves(const uint16_t *values, uint64_t bits)
{
    return _mm_shuffle_epi8(
        _mm_loadu_si128((const __m128i *)values), _mm_loadu_si128((const __m128i *)places[bits]));
}

TARGET static inline __attribute__((always_inline)) __m256 eight_floats(const float *values, uint64_t bits)
{
    /* the low byte of each pair is twice the number of the value, or more than 127 where there is none */
    const __m256i twice = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)places[bits]));
    const __m256i absent = _mm256_srai_epi32(_mm256_slli_epi32(twice, 16), 31);
    const __m256i number = _mm256_srli_epi32(_mm256_slli_epi32(twice, 24), 25);
    return _mm256_andnot_ps(
        _mm256_castsi256_ps(absent), _mm256_permutevar8x32_ps(_mm256_loadu_ps(values), number));
}

TARGET static inline __attribute__((always_inline)) float total_of_eight(__m256 sums)
{
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

#define NAME avx2_bfloat16
#define VALUE uint16_t
#define X float
#define LANES 8
#define HEIGHT 1
#define SUMS __m256
#define ZERO _mm256_setzero_ps()
#define ADD _mm256_add_ps
#define TOTAL total_of_eight
#define ENTRIES __m256
#define EXPAND(values, bits) \
    _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(eight_halves(values, bits)), 16))
#define INPUTS __m256
#define LOAD(x) _mm256_loadu_ps(x)
#define DOT(sums, entries, x) _mm256_fmadd_ps(entries, x, sums)
#define FLOAT AS_IS
#define ROUND AS_IS
#include "multiply.h"

#define NAME avx2_float16
#define VALUE uint16_t
#define X float
#define LANES 8
#define HEIGHT 1
#define SUMS __m256
#define ZERO _mm256_setzero_ps()
#define ADD _mm256_add_ps
#define TOTAL total_of_eight
#define ENTRIES __m256
#define EXPAND(values, bits) _mm256_cvtph_ps(eight_halves(values, bits))
#define INPUTS __m256
#define LOAD(x) _mm256_loadu_ps(x)
#define DOT(sums, entries, x) _mm256_fmadd_ps(entries, x, sums)
#define FLOAT AS_IS
#define ROUND AS_IS
#include "multiply.h"

#define NAME avx2_float32
#define VALUE float
#define X float
#define LANES 8
#define HEIGHT 1
#define SUMS __m256
#define ZERO _mm256_setzero_ps()
#define ADD _mm256_add_ps
#define TOTAL total_of_eight
#define ENTRIES __m256
#define EXPAND eight_floats
#define INPUTS __m256
#define LOAD(x) _mm256_loadu_ps(x)
#define DOT(sums, entries, x) _mm256_fmadd_ps(entries, x, sums)
#define FLOAT AS_IS
#define ROUND AS_IS
#include "multiply.h"

#define NAME avx2_expand16
#define VALUE uint16_t
#define LANES 8
#define PLACE(out, values, bits) _mm_storeu_si128((__m128i *)(out), eight_halves(values, bits))
#include "expand.h"

#define NAME avx2_expand32
#define VALUE float
#define LANES 8
#define PLACE(out, values, bits) _mm256_storeu_ps(out, eight_floats(values, bits))
#include "expand.h"

const Multiply bfloat16_dot = bfloat16_dot_kernel;
const Kernels avx512_kernels = {
    .multiply = {[FLOAT32] = avx512_float32, [FLOAT16] = avx512_float16, [BFLOAT16] = avx512_bfloat16},
    .expand = {[FLOAT32] = avx512_expand32, [FLOAT16] = avx512_expand16, [BFLOAT16] = avx512_expand16},
};
const Kernels avx2_kernels = {
    .multiply = {[FLOAT32] = avx2_float32, [FLOAT16] = avx2_float16, [BFLOAT16] = avx2_bfloat16},
    .expand = {[FLOAT32] = avx2_expand32, [FLOAT16] = avx2_expand16, [BFLOAT16] = avx2_expand16},
};

#else
typedef int nothing_to_compile;
#endif
