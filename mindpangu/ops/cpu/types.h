// Every dtype that MindSpore has, for the primitives that have to serve them all.
#pragma once

#include <complex>
#include <cstring>

#include "vec.h"

namespace pangu {

// IEEE half precision.
struct f16 {
  uint16_t bits;
};

inline float to_float(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  uint32_t bits;
  if (exponent == 31) {
    bits = 0x7f800000 | fraction << 13;
  } else if (exponent) {
    bits = (exponent + 112) << 23 | fraction << 13;
  } else {
    const float small = fraction * 5.9604644775390625e-8f;  // 2^-24
    std::memcpy(&bits, &small, 4);
  }
  bits |= sign;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
// To nearest, ties to even.
inline f16 to_f16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint16_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (bits >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // 65520 rounds to infinity
  if (bits < 0x38800000) {                                   // below 2^-14: a multiple of 2^-24
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    const float aligned = magnitude + 0.5f;  // float32 has 2^-24 as its last place here
    std::memcpy(&bits, &aligned, 4);
    return {uint16_t(sign | (bits - 0x3f000000))};
  }
  return {uint16_t(sign | (bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13)};
}

inline vf load(const f16* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vf x;
  for (int i = 0; i < kLanes; i++) x[i] = to_float(p[i]);
  return x;
#endif
}
inline void store(f16* p, vf x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; i++) p[i] = to_f16(x[i]);
#endif
}

inline bool is_complex64(const char* name) { return name && std::strcmp(name, "complex64") == 0; }
inline bool is_complex128(const char* name) { return name && std::strcmp(name, "complex128") == 0; }

// Bytes of an element; 0 for a dtype that is not a tensor's.
inline int64_t bytes_of(const Call& call, int tensor) {
  const char* name = call.dtypes[tensor];
  return is_complex64(name) ? 8 : is_complex128(name) ? 16 : size_of(call[tensor].dtype);
}

// body(T()) with the element type T of a tensor.
template <typename Body>
void with_type(const Call& call, int tensor, const Body& body) {
  if (is_complex64(call.dtypes[tensor])) return body(std::complex<float>());
  if (is_complex128(call.dtypes[tensor])) return body(std::complex<double>());
  switch (call[tensor].dtype) {
    case DType::f32: return body(float());
    case DType::bf16: return body(bf16());
    case DType::f16: return body(f16());
    case DType::f64: return body(double());
    case DType::i8: return body(int8_t());
    case DType::i16: return body(int16_t());
    case DType::i32: return body(int32_t());
    case DType::i64: return body(int64_t());
    case DType::u8: return body(uint8_t());
    case DType::u16: return body(uint16_t());
    case DType::u32: return body(uint32_t());
    case DType::u64: return body(uint64_t());
    case DType::boolean: return body(bool());
    default: break;
  }
  const char* name = call.dtypes[tensor];
  expect(false, call, ("tensor " + std::to_string(tensor)).c_str(), name ? name : "none",
         "a float, integer, bool or complex dtype");
}

// The value with which arithmetic is done: halves as float32.
inline float widen(bf16 x) { return to_float(x); }
inline float widen(f16 x) { return to_float(x); }
template <typename T>
inline T widen(T x) {
  return x;
}
template <typename T, typename Wide>
inline T narrow(Wide x) {
  return static_cast<T>(x);
}
template <>
inline bf16 narrow<bf16, float>(float x) {
  return to_bf16(x);
}
template <>
inline f16 narrow<f16, float>(float x) {
  return to_f16(x);
}

// Runs a primitive's body with float32 tensors in the place of its float16 ones.
void in_float32(const Call& call, void (*body)(const Call&));

}  // namespace pangu
