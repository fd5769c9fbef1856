// SIMD in GCC's vector extension: one source for AVX-512, AVX2 and everything else (NEON, SSE2). The library is compiled
// for one instruction set; which one is chosen when it is loaded (see build.py).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512BF16__) || defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include "common.h"

namespace pangu {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vf __attribute__((vector_size(4 * kLanes)));
typedef int32_t vi __attribute__((vector_size(4 * kLanes)));
typedef uint32_t vu __attribute__((vector_size(4 * kLanes)));
typedef uint16_t vh __attribute__((vector_size(2 * kLanes)));
typedef float vf_unaligned __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint16_t vh_unaligned __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));
typedef int32_t vi_unaligned __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

// Not as 0 + x, which the compiler has to compute because of -0: a product's inner loop would take half as long again.
inline vf splat(float x) {
#if defined(__AVX512F__)
  return (vf)_mm512_set1_ps(x);
#elif defined(__AVX2__)
  return (vf)_mm256_set1_ps(x);
#else
  return vf{x, x, x, x};
#endif
}
inline vf load(const float* p) { return *reinterpret_cast<const vf_unaligned*>(p); }
inline void store(float* p, vf x) { *reinterpret_cast<vf_unaligned*>(p) = x; }
inline vf as_float(vi x) { return (vf)x; }
inline vi as_int(vf x) { return (vi)x; }

inline float to_float(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
// To nearest, ties to even; NaN stays NaN.
inline bf16 to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return {uint16_t((bits >> 16) | 64)};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

inline vf load(const bf16* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16);
#elif defined(__AVX2__)
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16);
#else
  vu bits = __builtin_convertvector(*reinterpret_cast<const vh_unaligned*>(p), vu) << 16;
  return (vf)bits;
#endif
}
inline void store(bf16* p, vf x) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
  vi bits = as_int(x);
  vi rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  vi is_nan = x != x;
  rounded = (rounded & ~is_nan) | (((bits >> 16) | 64) & is_nan);
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16((__m512i)rounded));
#else
  *reinterpret_cast<vh_unaligned*>(p) = __builtin_convertvector((vu)rounded, vh);
#endif
#endif
}

inline vf round_to_bf16(vf x) {
  bf16 rounded[kLanes];
  store(rounded, x);
  return load(rounded);
}

// The first n < kLanes elements, zeros behind them; and their store.
template <typename T>
inline vf load_part(const T* p, int n) {
  T buffer[kLanes] = {};
  std::memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}
template <typename T>
inline void store_part(T* p, vf x, int n) {
  T buffer[kLanes];
  store(buffer, x);
  std::memcpy(p, buffer, n * sizeof(T));
}

inline vf vmax(vf a, vf b) { return a > b ? a : b; }
inline vf vmin(vf a, vf b) { return a < b ? a : b; }
inline vf select(vi mask, vf yes, vf no) { return mask ? yes : no; }

// Sums and maxima over the lanes, always in the same order.
inline float reduce_sum(vf x) {
#if defined(__AVX512F__)
  const __m512 all = (__m512)x;
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
#elif defined(__AVX2__)
  const __m256 half = (__m256)x;
#endif
#if defined(__AVX2__)
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
#else
  float lanes[kLanes];
  store(lanes, x);
  for (int step = kLanes / 2; step > 0; step /= 2)
    for (int i = 0; i < step; i++) lanes[i] += lanes[i + step];
  return lanes[0];
#endif
}
inline float reduce_max(vf x) {
  float lanes[kLanes];
  store(lanes, x);
  for (int step = kLanes / 2; step > 0; step /= 2)
    for (int i = 0; i < step; i++) lanes[i] = lanes[i] > lanes[i + step] ? lanes[i] : lanes[i + step];
  return lanes[0];
}

// kLanes x kLanes elements: log2(kLanes) times, each vector of the first half is interleaved with its like of the
// second.
inline void transpose(vf r[kLanes]) {
#if defined(__AVX512F__)
  const vi low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
#elif defined(__AVX2__)
  const vi low = {0, 8, 1, 9, 2, 10, 3, 11};
#else
  const vi low = {0, 4, 1, 5};
#endif
  const vi high = low + kLanes / 2;
  for (int step = 1; step < kLanes; step *= 2) {
    vf t[kLanes];
    for (int i = 0; i < kLanes / 2; i++) {
      t[2 * i] = __builtin_shuffle(r[i], r[i + kLanes / 2], low);
      t[2 * i + 1] = __builtin_shuffle(r[i], r[i + kLanes / 2], high);
    }
    for (int i = 0; i < kLanes; i++) r[i] = t[i];
  }
}

// e^x with 1.5 ulp; 0 below -87.3 (float32's smallest normal), inf above 88.7; NaN stays NaN.
// Cephes' polynomial (S. Moshier) on the fraction of x log2(e).
inline vf vexp(vf x) {
  vf clamped = vmin(vmax(x, splat(-87.5f)), splat(89.0f));
  vf shifted = clamped * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: rounds to the nearest integer
  vf n = shifted - 12582912.0f;
  vf r = clamped - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // 2^n in two factors, because n reaches 128.
  vi half = __builtin_convertvector(n, vi) >> 1, rest = __builtin_convertvector(n, vi) - half;
  p = p * as_float((half + 127) << 23) * as_float((rest + 127) << 23);
  p = x < splat(-87.33654f) ? vf{} : p;
  p = x > splat(88.72283f) ? splat(INFINITY) : p;
  return x != x ? x : p;
}

// ln x with 1.5 ulp; -inf from float32's smallest normal down to 0, NaN below it.
// Cephes' polynomial (S. Moshier) on the fraction, from sqrt(1/2) to sqrt(2).
inline vf vlog(vf x) {
  const vi bits = as_int(x);
  vi exponent = (bits >> 23) - 126;
  vf r = as_float((bits & 0x007fffff) | 0x3f000000);  // from 1/2 to 1
  const vi is_low = r < splat(0.707106781186547524f);
  exponent = is_low ? exponent - 1 : exponent;
  r = (is_low ? r + r : r) - 1.0f;
  const vf n = __builtin_convertvector(exponent, vf), square = r * r;
  vf p = splat(7.0376836292e-2f);
  p = p * r - 1.1514610310e-1f;
  p = p * r + 1.1676998740e-1f;
  p = p * r - 1.2420140846e-1f;
  p = p * r + 1.4249322787e-1f;
  p = p * r - 1.6668057665e-1f;
  p = p * r + 2.0000714765e-1f;
  p = p * r - 2.4999993993e-1f;
  p = p * r + 3.3333331174e-1f;
  p = p * r * square - n * 2.12194440e-4f - 0.5f * square;
  p = r + p + n * 0.693359375f;
  p = x == splat(INFINITY) ? x : p;
  p = x < splat(1.17549435e-38f) ? splat(-INFINITY) : p;
  return (x < vf{}) | (x != x) ? splat(NAN) : p;
}

}  // namespace pangu
