// Operands of bfloat16 instructions, which multiply pairs of neighbours along K. In AMX tiles a block of 32 lines (rows
// of A, columns of B) is, for each 32 along K and each of its parts, two tiles of 16 rows of 32 bfloat16: 16 lines, or
// for B 16 pairs of k with both elements of a pair beside each other. Without AMX it is such pairs, [K / 2][lines][2].
#pragma once

#include "vec.h"

namespace pangu {

// Whether a product of numbers that are sums of `parts` bfloat16 numbers takes its operands like that.
template <int parts>
#if defined(__AMX_BF16__)
constexpr bool kInPairs = true;
#elif defined(__AVX512BF16__)
constexpr bool kInPairs = parts == 1;
#else
constexpr bool kInPairs = false;
#endif

// Into a block of 32 columns of B: rows k and k + 1, k even, of kLanes columns from `column` on.
template <int parts>
inline void store_right(void* packed, int64_t k, int64_t column, vf even, vf odd);

#if defined(__AVX512BF16__)

constexpr int kTileSide = 32, kTileElements = kTileSide * kTileSide;

// 32 numbers as sums of bfloat16 numbers: the nearest one, the nearest to what that leaves, and so on.
template <int parts>
inline void split(vf low, vf high, __m512i to[parts]) {
  for (int i = 0; i < parts; i++) {
    to[i] = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    if (i + 1 == parts) break;
    low -= (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(to[i])), 16);
    high -= (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(to[i], 1)), 16);
  }
}

// The lower and the upper 16 numbers in turn.
inline __m512i interleave(__m512i halves) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, halves);
}

template <int parts>
inline void store_right(void* packed, int64_t k, int64_t column, vf even, vf odd) {
  static_assert(kInPairs<parts>);
  __m512i r[parts];
  split<parts>(even, odd, r);
#if defined(__AMX_BF16__)
  bf16* line = static_cast<bf16*>(packed) + k / 32 * parts * kTileElements + column * 32 + k % 32 * 16;
#else
  bf16* line = static_cast<bf16*>(packed) + (k * kTileSide + column * 2);
#endif
  for (int i = 0; i < parts; i++) _mm512_store_si512(line + i * kTileElements, interleave(r[i]));
}

#if defined(__AMX_BF16__)
// Into a block of A: 32 columns of a row below 32.
template <int parts>
inline void store_left(void* packed, int64_t row, vf low, vf high) {
  __m512i r[parts];
  split<parts>(low, high, r);
  for (int i = 0; i < parts; i++) _mm512_store_si512(static_cast<bf16*>(packed) + i * kTileElements + row * 32, r[i]);
}
#endif

#endif  // AVX512BF16

}  // namespace pangu
