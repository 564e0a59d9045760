/* Vectors of 16 float32, and the functions on them that more than one kernel needs. */
#pragma once

#include <immintrin.h>
#include <stdint.h>

#if !defined(__AVX512F__) || !defined(__AVX512BW__) || !defined(__AVX512DQ__) || !defined(__AVX512VNNI__)
#error "the processor lacks AVX-512 with VNNI"
#endif

#define LANES 16
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

/* The mask of the first `count` lanes; all of them from 16 on. */
INLINE __mmask16 first_lanes(int count) { return count >= LANES ? 0xffff : (__mmask16)((1u << (count > 0 ? count : 0)) - 1); }

/* 2^x to float32's accuracy; x below -126 counts as -126. */
INLINE __m512 exp2_16(__m512 x) {
    x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-126)), _mm512_set1_ps(128));
    __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 part = _mm512_sub_ps(x, whole); /* within half of 0: Taylor's series of 2^part */
    __m512 power = _mm512_set1_ps(1.5403530e-4f);
    power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(1.3333558e-3f));
    power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(9.6181291e-3f));
    power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(5.5504109e-2f));
    power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(2.4022651e-1f));
    power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(6.9314718e-1f));
    power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(1));
    return _mm512_scalef_ps(power, whole);
}

/* x / (1 + e^-x) */
INLINE __m512 silu_16(__m512 x) {
    __m512 falling = exp2_16(_mm512_mul_ps(x, _mm512_set1_ps(-1.44269504f)));
    return _mm512_div_ps(x, _mm512_add_ps(falling, _mm512_set1_ps(1)));
}
