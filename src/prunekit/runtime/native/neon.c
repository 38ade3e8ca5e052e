/* ARM: a table look-up does what the expanding move of AVX-512 does, eight entries at a time. */

#if defined(__aarch64__)

#include "packed.h"
#include <arm_neon.h>

#define TARGET
#define AS_IS(value) (value)

typedef struct {
    float32x4_t low, high;
} Eight;

static inline Eight zeros(void)
{
    return (Eight){vdupq_n_f32(0), vdupq_n_f32(0)};
}

static inline Eight sum(Eight a, Eight b)
{
    return (Eight){vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)};
}

static inline Eight load(const float *x)
{
    return (Eight){vld1q_f32(x), vld1q_f32(x + 4)};
}

static inline Eight dot(Eight sums, Eight entries, Eight x)
{
    return (Eight){vfmaq_f32(sums.low, entries.low, x.low), vfmaq_f32(sums.high, entries.high, x.high)};
}

static inline uint16x8_t eight_halves(const uint16_t *values, uint64_t bits)
{
    return vreinterpretq_u16_u8(vqtbl1q_u8(vld1q_u8((const uint8_t *)values), vld1q_u8(places[bits])));
}

static inline Eight eight_bfloat16(const uint16_t *values, uint64_t bits)
{
    const uint16x8_t halves = eight_halves(values, bits);
    return (Eight){
        vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(halves), 16)),
        vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(halves), 16))};
}

static inline Eight eight_float16(const uint16_t *values, uint64_t bits)
{
    const float16x8_t halves = vreinterpretq_f16_u16(eight_halves(values, bits));
    return (Eight){vcvt_f32_f16(vget_low_f16(halves)), vcvt_high_f32_f16(halves)};
}

static inline float32x4_t four_floats(const uint8_t *values, uint8x8_t places_of_halves)
{
    /* 2k, 2k + 1 -> 4k, 4k + 1, 4k + 2, 4k + 3; what is absent stays out of range */
    const uint16x8_t wide = vmovl_u8(places_of_halves);
    const uint32x4_t pair = vreinterpretq_u32_u16(wide);
    const uint32x4_t first = vandq_u32(pair, vdupq_n_u32(0xff));
    const uint32x4_t start = vminq_u32(vshlq_n_u32(first, 1), vdupq_n_u32(0xc0));
    const uint32x4_t bytes = vaddq_u32(vmulq_n_u32(start, 0x01010101), vdupq_n_u32(0x03020100));
    return vreinterpretq_f32_u8(vqtbl2q_u8(vld1q_u8_x2(values), vreinterpretq_u8_u32(bytes)));
}

static inline Eight eight_float32(const float *values, uint64_t bits)
{
    const uint8x16_t place = vld1q_u8(places[bits]);
    const uint8_t *bytes = (const uint8_t *)values;
    return (Eight){four_floats(bytes, vget_low_u8(place)), four_floats(bytes, vget_high_u8(place))};
}

static inline void put_eight(float *out, Eight entries)
{
    vst1q_f32(out, entries.low);
    vst1q_f32(out + 4, entries.high);
}

#define NAME neon_bfloat16
#define VALUE uint16_t
#define X float
#define LANES 8
#define HEIGHT 1
#define SUMS Eight
#define ZERO zeros()
#define ADD sum
#define TOTAL(sums) vaddvq_f32(vaddq_f32((sums).low, (sums).high))
#define ENTRIES Eight
#define EXPAND eight_bfloat16
#define INPUTS Eight
#define LOAD load
#define DOT dot
#define FLOAT AS_IS
#define ROUND AS_IS
#include "multiply.h"

#define NAME neon_float16
#define VALUE uint16_t
#define X float
#define LANES 8
#define HEIGHT 1
#define SUMS Eight
#define ZERO zeros()
#define ADD sum
#define TOTAL(sums) vaddvq_f32(vaddq_f32((sums).low, (sums).high))
#define ENTRIES Eight
#define EXPAND eight_float16
#define INPUTS Eight
#define LOAD load
#define DOT dot
#define FLOAT AS_IS
#define ROUND AS_IS
#include "multiply.h"

#define NAME neon_float32
#define VALUE float
#define X float
#define LANES 8
#define HEIGHT 1
#define SUMS Eight
#define ZERO zeros()
#define ADD sum
#define TOTAL(sums) vaddvq_f32(vaddq_f32((sums).low, (sums).high))
#define ENTRIES Eight
#define EXPAND eight_float32
#define INPUTS Eight
#define LOAD load
#define DOT dot
#define FLOAT AS_IS
#define ROUND AS_IS
#include "multiply.h"

#define NAME neon_expand16
#define VALUE uint16_t
#define LANES 8
#define PLACE(out, values, bits) vst1q_u16(out, eight_halves(values, bits))
#include "expand.h"

#define NAME neon_expand32
#define VALUE float
#define LANES 8
#define PLACE(out, values, bits) put_eight(out, eight_float32(values, bits))
#include "expand.h"

const Kernels neon_kernels = {
    .multiply = {[FLOAT32] = neon_float32, [FLOAT16] = neon_float16, [BFLOAT16] = neon_bfloat16},
    .expand = {[FLOAT32] = neon_expand32, [FLOAT16] = neon_expand16, [BFLOAT16] = neon_expand16},
};

#else
typedef int nothing_to_compile;
#endif
