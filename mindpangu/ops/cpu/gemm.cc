// Blocked matrix products on packed operands (Goto and van de Geijn, doi:10.1145/1356052.1356053): bfloat16 in AMX
// tiles, in AVX512-BF16 dot products, or rounded and multiplied as float32 where a machine has neither; float32 in FMA
// registers, or where there are AMX tiles as six products of bfloat16 parts (Henry, Tang and Heinecke,
// arXiv:1904.06376), which takes half the time: x = x0 + x1 + x2 holds all 24 bits of a float32, and what is left out
// of x y is below 2^-23 of it. Infinity, and what rounds to it (3.39e38), becomes NaN that way.
#include "gemm.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "pairs.h"
#include "types.h"

#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pangu {

namespace {

bool rounds_products = false;

constexpr int64_t kPackStrip = 32;  // a multiple of every block_k
// Rows of memory that are asked for ahead where each gives a short run: no processor foresees those.
constexpr int64_t kRowsAhead = 32;

// ---- Products of one block ------------------------------------------------------------------------------------------

#if defined(__AMX_BF16__)

// Linux grants the tile registers per process; each thread sets their shapes, again whenever it comes from other code:
// PyTorch and oneDNN set and release them too, and a tile instruction without shapes kills the process.
void prepare_tiles() {
  static const bool granted = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;
  if (!granted) throw Error("the system does not grant AMX tiles to this process.");
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {};
    uint8_t rows[16] = {};
  } shapes;
  for (int i = 0; i < 8; i++) {
    shapes.bytes_per_row[i] = 64;
    shapes.rows[i] = 16;
  }
  // GCC's intrinsic says that it reads 8 bytes: without this the other stores are dead to the compiler.
  __asm__ volatile("" : : "r"(&shapes) : "memory");
  _tile_loadconfig(&shapes);
}

inline void load_left(const bf16* a) {
  _tile_loadd(4, a, 64);
  _tile_loadd(5, a + kTileElements / 2, 64);
}
inline void load_right(const bf16* b) {
  _tile_loadd(6, b, 64);
  _tile_loadd(7, b + kTileElements / 2, 64);
}
inline void multiply_tiles() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// a: [K / 32][parts][2][16 rows][32], b: [K / 32][parts][2][16 pairs of k][16 columns][2].
template <int parts>
void product_tiles(const bf16* a, const bf16* b, int64_t K, float* tile, int64_t stride, bool accumulate) {
  static thread_local int64_t prepared_in = -1;
  if (prepared_in != num_entries) {
    prepare_tiles();
    prepared_in = num_entries;
  }
  const int64_t bytes = stride * 4;
  if (accumulate) {
    _tile_loadd(0, tile, bytes);
    _tile_loadd(1, tile + 16, bytes);
    _tile_loadd(2, tile + 16 * stride, bytes);
    _tile_loadd(3, tile + 16 * stride + 16, bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < K; k += 32) {
    load_left(a);
    if constexpr (parts == 1) {
      load_right(b);
      multiply_tiles();
    } else {  // from the smallest terms to the largest; six tiles of twelve are loaded once, one twice
      load_right(b + 2 * kTileElements);
      multiply_tiles();
      load_right(b + kTileElements);
      multiply_tiles();
      load_left(a + kTileElements);
      multiply_tiles();
      load_right(b);
      multiply_tiles();
      load_left(a + 2 * kTileElements);
      multiply_tiles();
      load_left(a);
      multiply_tiles();
    }
    a += parts * kTileElements;
    b += parts * kTileElements;
  }
  _tile_stored(0, tile, bytes);
  _tile_stored(1, tile + 16, bytes);
  _tile_stored(2, tile + 16 * stride, bytes);
  _tile_stored(3, tile + 16 * stride + 16, bytes);
}

#else

#if defined(__AVX512F__)
constexpr int kRows = 12, kColumnVectors = 2;  // 24 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int kRows = 6, kColumnVectors = 2;  // 12 of 16
#elif defined(__aarch64__)
constexpr int kRows = 8, kColumnVectors = 3;  // 24 of 32
#else
constexpr int kRows = 4, kColumnVectors = 2;  // 8 of 16
#endif
constexpr int kColumns = kColumnVectors * kLanes;

// a: [K][kRows], b: [K][kColumns].
void product_f32(const float* a, const float* b, int64_t K, float* tile, int64_t stride, bool accumulate) {
  vf sum[kRows][kColumnVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; i++)
#pragma GCC unroll 4
    for (int j = 0; j < kColumnVectors; j++) sum[i][j] = vf{};
  for (int64_t k = 0; k < K; k++) {
    vf column[kColumnVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kColumnVectors; j++) column[j] = load(b + k * kColumns + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; i++) {
      vf row = splat(a[k * kRows + i]);
#pragma GCC unroll 4
      for (int j = 0; j < kColumnVectors; j++) sum[i][j] += row * column[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; i++)
#pragma GCC unroll 4
    for (int j = 0; j < kColumnVectors; j++) {
      float* place = tile + i * stride + j * kLanes;
      store(place, accumulate ? load(place) + sum[i][j] : sum[i][j]);
    }
}

#if defined(__AVX512BF16__)

constexpr int kBf16Rows = kRows, kBf16Columns = kColumns, kBf16K = 2;

// a: [K / 2][kRows][2], b: [K / 2][kColumns][2].
void product_bf16(const bf16* a, const bf16* b, int64_t K, float* tile, int64_t stride, bool accumulate) {
  __m512 sum[kRows][kColumnVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; i++)
#pragma GCC unroll 4
    for (int j = 0; j < kColumnVectors; j++) sum[i][j] = _mm512_setzero_ps();
  for (int64_t k = 0; k < K; k += 2) {
    __m512bh column[kColumnVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kColumnVectors; j++) column[j] = (__m512bh)_mm512_loadu_si512(b + j * 2 * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; i++) {
      int32_t pair;
      std::memcpy(&pair, a + 2 * i, 4);
      __m512bh row = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int j = 0; j < kColumnVectors; j++) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], row, column[j]);
    }
    a += 2 * kRows;
    b += 2 * kColumns;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; i++)
#pragma GCC unroll 4
    for (int j = 0; j < kColumnVectors; j++) {
      float* place = tile + i * stride + j * kLanes;
      store(place, accumulate ? load(place) + (vf)sum[i][j] : (vf)sum[i][j]);
    }
}

typedef bf16 Rounded;

#else

constexpr int kBf16Rows = kRows, kBf16Columns = kColumns, kBf16K = 1;

// A float32 that holds a bfloat16's value: without bfloat16 instructions products are those of float32.
struct Rounded {
  float value;
};
using pangu::store;
inline void store(Rounded* p, vf x) { store(&p->value, round_to_bf16(x)); }
#endif

#endif  // AMX

// ---- Packing --------------------------------------------------------------------------------------------------------

inline void put(float* to, float x) { *to = x; }
#if !defined(__AVX512BF16__)
inline void put(Rounded* to, float x) { to->value = to_float(to_bf16(x)); }
inline void put(Rounded* to, bf16 x) { to->value = to_float(x); }
#endif
inline void put(bf16* to, float x) { *to = to_bf16(x); }
inline void put(float* to, bf16 x) { *to = to_float(x); }
inline void put(float* to, f16 x) { *to = to_float(x); }
inline void put(bf16* to, bf16 x) { *to = x; }

// n contiguous elements, converted.
template <typename To, typename From>
inline void copy_run(To* to, const From* from, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
  for (; i < n; i++) put(to + i, from[i]);
}
template <>
inline void copy_run(bf16* to, const bf16* from, int64_t n) {
  std::memcpy(to, from, n * sizeof(bf16));
}

#if defined(__AVX512BF16__)

// 16 x 16 transposition of 4-byte elements.
inline void transpose16(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

// n elements, zeros behind them, as the sum of `parts` bfloat16 numbers each.
template <int parts>
inline void load32(const bf16* p, int n, __m512i to[parts]) {
  __mmask32 mask = n >= 32 ? 0xffffffffu : (1u << n) - 1;
  to[0] = _mm512_maskz_loadu_epi16(mask, p);
  for (int i = 1; i < parts; i++) to[i] = _mm512_setzero_si512();
}
template <int parts>
inline void load32(const float* p, int n, __m512i to[parts]) {
  __mmask16 low = n >= 16 ? 0xffff : (1u << n) - 1, high = n >= 32 ? 0xffff : n > 16 ? (1u << (n - 16)) - 1 : 0;
  split<parts>((vf)_mm512_maskz_loadu_ps(low, p), (vf)_mm512_maskz_loadu_ps(high, p + 16), to);
}

// 16 elements beside each other in each of two rows, first all of the one; n elements and `rows` rows exist.
template <int parts>
inline void load_pair(const bf16* p, int64_t step, int64_t rows, int n, __m512i to[parts]) {
  const __mmask16 mask = (1u << n) - 1;
  const __m256i even = _mm256_maskz_loadu_epi16(rows > 0 ? mask : 0, p);
  const __m256i odd = _mm256_maskz_loadu_epi16(rows > 1 ? mask : 0, p + step);
  to[0] = _mm512_inserti64x4(_mm512_castsi256_si512(even), odd, 1);
  for (int i = 1; i < parts; i++) to[i] = _mm512_setzero_si512();
}
template <int parts>
inline void load_pair(const float* p, int64_t step, int64_t rows, int n, __m512i to[parts]) {
  const __mmask16 mask = (1u << n) - 1;
  split<parts>((vf)_mm512_maskz_loadu_ps(rows > 0 ? mask : 0, p),
               (vf)_mm512_maskz_loadu_ps(rows > 1 ? mask : 0, p + step), to);
}

#endif  // AVX512BF16

#if defined(__AMX_BF16__)

inline void transpose_tile(bf16* tile) {
  __m512i r[16];
  for (int i = 0; i < 16; i++) r[i] = _mm512_load_si512(tile + i * 32);
  transpose16(r);
  for (int i = 0; i < 16; i++) _mm512_store_si512(tile + i * 32, r[i]);
}

// A tile's 16 lines of 32 along K. Lines are contiguous along K (step 1): AMX's layout of A, and transposed that of B.
template <int parts, typename From>
void pack_lines(const From* from, int64_t line, int64_t lines, int64_t K, bool transposed, bf16* to) {
  for (int64_t k = 0; k < K; k += 32, to += parts * kTileElements) {
    const int n = static_cast<int>(std::min<int64_t>(32, K - k));
    for (int i = 0; i < kTileSide; i++) {
      __m512i r[parts] = {};
      if (i < lines) load32<parts>(from + i * line + k, n, r);
      for (int j = 0; j < parts; j++) _mm512_store_si512(to + j * kTileElements + i * 32, r[j]);
    }
    for (int j = 0; transposed && j < 2 * parts; j++) transpose_tile(to + j * kTileElements / 2);
  }
}

// The same from lines that are contiguous across (line stride 1): B's layout is pairs of k interleaved.
template <int parts, typename From>
void pack_across(const From* from, int64_t step, int64_t lines, int64_t K, bool transposed, bf16* to) {
  for (int64_t k = 0; k < K; k += 32, to += parts * kTileElements) {
    for (int half = 0; half < 2; half++) {
      const int n = static_cast<int>(std::clamp<int64_t>(lines - half * 16, 0, 16));
      bf16* place = to + half * kTileElements / 2;
      for (int i = 0; i < 16; i++) {
        __m512i r[parts];
        load_pair<parts>(from + (k + 2 * i) * step + half * 16, step, K - k - 2 * i, n, r);
        for (int j = 0; j < parts; j++) _mm512_store_si512(place + j * kTileElements + i * 32, interleave(r[j]));
      }
      if (!transposed) continue;
      for (int j = 0; j < parts; j++) transpose_tile(place + j * kTileElements);
    }
  }
}

template <int parts, bool is_b, typename From>
void pack_tiles(const From* from, int64_t line, int64_t step, int64_t lines, int64_t K, bf16* to) {
  if (step == 1) {
    pack_lines<parts>(from, line, lines, K, is_b, to);
  } else if (line == 1) {
    pack_across<parts>(from, step, lines, K, !is_b, to);
  } else {
    From gathered[32 * 32];
    for (int64_t k = 0; k < K; k += 32) {
      int64_t n = std::min<int64_t>(32, K - k);
      std::memset(static_cast<void*>(gathered), 0, sizeof(gathered));
      for (int64_t i = 0; i < lines; i++)
        for (int64_t j = 0; j < n; j++) gathered[i * 32 + j] = from[i * line + (k + j) * step];
      pack_lines<parts>(gathered, 32, 32, 32, is_b, to);
      to += parts * kTileElements;
    }
  }
}

#else

// Panel [K][width] of lines that are contiguous along K; missing lines are zeros.
template <int width, typename From>
void pack_transposed(const From* from, int64_t line, int64_t lines, int64_t K, float* to) {
  for (int64_t k = 0; k < K; k += kLanes) {
    const int n = static_cast<int>(std::min<int64_t>(kLanes, K - k));
    for (int first = 0; first < width; first += kLanes) {
      const int wide = std::min(kLanes, width - first);
      vf r[kLanes];
      for (int i = 0; i < kLanes; i++) {
        const From* source = from + (first + i) * line + k;
        r[i] = i >= wide || first + i >= lines ? vf{} : n == kLanes ? load(source) : load_part(source, n);
      }
      transpose(r);
      for (int s = 0; s < n; s++) {
        float* place = to + (k + s) * width + first;
        // What a whole vector writes behind a narrow panel's row belongs to the next row, which comes next.
        if (wide == kLanes || (width < kLanes && k + s + 1 < K && (k + s + 1) * width + kLanes <= K * width)) {
          store(place, r[s]);
        } else {
          store_part(place, r[s], wide);
        }
      }
    }
  }
}

#if defined(__AVX512BF16__)

// Panel [K / 2][width][2] of lines that are contiguous along K, or across them.
template <int width, typename From>
void pack_pairs(const From* from, int64_t line, int64_t step, int64_t lines, int64_t K, bf16* to) {
  auto put = [&](int64_t k, int first, __m512i pairs) {
    _mm512_mask_storeu_epi32(to + k * width + first * 2, (1u << std::min(16, width - first)) - 1, pairs);
  };
  for (int64_t k = 0; k < K; k += step == 1 ? 32 : 2)
    for (int first = 0; first < width; first += 16) {
      const int n = static_cast<int>(std::clamp<int64_t>(std::min<int64_t>(lines, width) - first, 0, 16));
      if (step == 1) {
        const int depth = static_cast<int>(std::min<int64_t>(32, K - k));
        __m512i r[16] = {};
        for (int i = 0; i < n; i++) load32<1>(from + (first + i) * line + k, depth, r + i);
        transpose16(r);
        for (int s = 0; s < depth; s += 2) put(k + s, first, r[s / 2]);
      } else {
        __builtin_prefetch(from + (k + kRowsAhead) * step + first);
        __builtin_prefetch(from + (k + kRowsAhead + 1) * step + first);
        __m512i r[1];
        load_pair<1>(from + k * step + first, step, K - k, n, r);
        put(k, first, interleave(r[0]));
      }
    }
}

#endif

// Panel layout [K / pair][width][pair]: `width` lines of an operand interleaved along K, `pair` neighbours in K
// together.
// lines: how many exist; `line` and `step` are the strides from line to line and along K.
template <int width, int pair, typename To, typename From>
void pack_panel(const From* from, int64_t line, int64_t step, int64_t lines, int64_t K, int64_t padded_k, To* to) {
  if constexpr (pair == 1 && std::is_same_v<To, float>) {
    if (step == 1) return pack_transposed<width>(from, line, lines, K, to);
  }
#if defined(__AVX512BF16__)
  if constexpr (pair == 2) {
    if (step == 1 || line == 1) return pack_pairs<width>(from, line, step, lines, K, to);
  }
#endif
  if (lines < width || padded_k != K) std::memset(static_cast<void*>(to), 0, padded_k * width * sizeof(To));
  if (line == 1) {  // neighbours of a line lie beside each other: whole runs
    for (int64_t k = 0; k < K; k++) {
      const From* source = from + k * step;
      for (int64_t i = 0; i < lines; i += 64 / int64_t(sizeof(From)))
        __builtin_prefetch(source + kRowsAhead * step + i);
      To* target = to + (k / pair) * width * pair + k % pair;
      if (pair == 1 && lines == width && std::is_same_v<To, From>) {
        std::memcpy(static_cast<void*>(target), source, width * sizeof(To));
      } else if (pair == 1 && lines == width) {
        copy_run(target, source, width);
      } else {
        for (int64_t i = 0; i < lines; i++) put(target + i * pair, source[i]);
      }
    }
    return;
  }
  constexpr int64_t strip = 64;  // of K, so that the target stays in the first-level cache while lines are walked
  for (int64_t begin = 0; begin < K; begin += strip) {
    int64_t end = std::min(K, begin + strip);
    for (int64_t i = 0; i < lines; i++) {
      const From* source = from + i * line;
      for (int64_t k = begin; k < end; k++)
        put(to + (k / pair) * width * pair + i * pair + k % pair, source[k * step]);
    }
  }
}

#endif

template <typename From>
void pack_a_from(const Packing& p, const From* from, const Operand& a, int64_t rows, int64_t K, void* packed) {
#if defined(__AMX_BF16__)
  auto pack = p.parts == 1 ? pack_tiles<1, false, From> : pack_tiles<3, false, From>;
  pack(from, a.row_stride, a.col_stride, rows, K, static_cast<bf16*>(packed));
#else
  if (p.bf16) {
    pack_panel<kBf16Rows, kBf16K>(from, a.row_stride, a.col_stride, rows, K, p.padded_k(K),
                                  static_cast<Rounded*>(packed));
  } else {
    pack_panel<kRows, 1>(from, a.row_stride, a.col_stride, rows, K, K, static_cast<float*>(packed));
  }
#endif
}

template <typename From>
void pack_b_from(const Packing& p, const From* from, const Operand& b, int64_t columns, int64_t K, void* packed) {
#if defined(__AMX_BF16__)
  auto pack = p.parts == 1 ? pack_tiles<1, true, From> : pack_tiles<3, true, From>;
  pack(from, b.col_stride, b.row_stride, columns, K, static_cast<bf16*>(packed));
#else
  if (p.bf16) {
    pack_panel<kBf16Columns, kBf16K>(from, b.col_stride, b.row_stride, columns, K, p.padded_k(K),
                                     static_cast<Rounded*>(packed));
  } else {
    pack_panel<kColumns, 1>(from, b.col_stride, b.row_stride, columns, K, K, static_cast<float*>(packed));
  }
#endif
}

Operand part(const Operand& x, int64_t row, int64_t column) {
  int64_t offset = row * x.row_stride + column * x.col_stride;
  return {static_cast<const char*>(x.data) + offset * size_of(x.dtype), x.dtype, x.row_stride, x.col_stride};
}

// ---- Few rows: bound by reading B once ------------------------------------------------------------------------------

constexpr int kFewRows = 8;
// Bytes of B that are asked for ahead of their use: what the processor foresees alone leaves a third of the bandwidth.
constexpr int64_t kAhead = 4096;

// sums[m] of M rows of A with one of B, both contiguous. rounds: B's elements to bfloat16.
template <int M, bool rounds, typename Weight>
inline void dot_rows(const float* a, int64_t K, const Weight* row, float* sums) {
  vf sum[M][2] = {};
  int64_t k = 0;
  for (; k + 2 * kLanes <= K; k += 2 * kLanes) {
    for (int64_t i = 0; i < 2 * kLanes; i += 64 / int64_t(sizeof(Weight)))
      __builtin_prefetch(row + k + i + kAhead / int64_t(sizeof(Weight)));
    vf low = load(row + k), high = load(row + k + kLanes);
    if (rounds) low = round_to_bf16(low), high = round_to_bf16(high);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      sum[m][0] += low * load(a + m * K + k);
      sum[m][1] += high * load(a + m * K + k + kLanes);
    }
  }
  for (int m = 0; m < M; m++) {
    sums[m] = reduce_sum(sum[m][0] + sum[m][1]);
    for (int64_t i = k; i < K; i++) {
      float weight;
      put(&weight, row[i]);
      if (rounds) weight = to_float(to_bf16(weight));
      sums[m] += weight * a[m * K + i];
    }
  }
}

// C[m, n] = sum over k of A[m, k] B[n, k]; both contiguous along K. A has M rows, of which g.M exist.
template <int M, bool rounds, typename Weight>
void few_rows(const Gemm& g, const float* a) {
  const Weight* b = static_cast<const Weight*>(g.b.data);
  const int64_t grain = std::max<int64_t>(8, (1 << 16) / (g.K * int64_t(sizeof(Weight)) + 1));
  parallel_blocks(g.N, grain, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n++) {
      float sums[M];
      dot_rows<M, rounds>(a, g.K, b + n * g.b.col_stride, sums);
      for (int64_t m = 0; m < g.M; m++) {
        const float total = sums[m] + (g.bias ? g.bias[n] : 0);
        const int64_t place = m * g.c_stride + n;
        if (g.c_dtype == DType::bf16) {
          static_cast<bf16*>(g.c)[place] = to_bf16(total);
        } else {
          float* c = static_cast<float*>(g.c) + place;
          *c = g.accumulate ? *c + total : total;
        }
      }
    }
  });
}

bool try_few_rows(const Gemm& g) {
  if (!has_few_rows(g)) return false;
  const int rows = g.M <= 1 ? 1 : g.M <= 4 ? 4 : kFewRows;
  float* a = static_cast<float*>(scratch(kOther, rows * g.K * 4));
  std::memset(a + g.M * g.K, 0, (rows - g.M) * g.K * 4);
  for (int64_t m = 0; m < g.M; m++)
    for (int64_t k = 0; k < g.K; k++) {
      int64_t place = m * g.a.row_stride + k * g.a.col_stride;
      if (g.a.dtype == DType::bf16) {
        a[m * g.K + k] = to_float(static_cast<const bf16*>(g.a.data)[place]);
      } else {
        float x = static_cast<const float*>(g.a.data)[place];
        a[m * g.K + k] = g.bf16_products ? to_float(to_bf16(x)) : x;
      }
    }
  auto run = [&](auto multiply_1, auto multiply_4, auto multiply_8) {
    rows == 1 ? multiply_1(g, a) : rows == 4 ? multiply_4(g, a) : multiply_8(g, a);
  };
  if (g.b.dtype == DType::bf16) {
    run(few_rows<1, false, bf16>, few_rows<4, false, bf16>, few_rows<8, false, bf16>);
  } else if (g.b.dtype == DType::f16) {
    run(few_rows<1, false, f16>, few_rows<4, false, f16>, few_rows<8, false, f16>);
  } else if (g.bf16_products) {
    run(few_rows<1, true, float>, few_rows<4, true, float>, few_rows<8, true, float>);
  } else {
    run(few_rows<1, false, float>, few_rows<4, false, float>, few_rows<8, false, float>);
  }
  return true;
}

// ---- Any size -------------------------------------------------------------------------------------------------------

// A tile of sums into C: what exists of it, with bias, in C's type.
void write_tile(const Gemm& g, const float* tile, int64_t stride, int64_t row, int64_t column, int64_t rows,
                int64_t columns, bool add, bool last) {
  const float* bias = last && g.bias ? g.bias + column : nullptr;
  for (int64_t i = 0; i < rows; i++) {
    const float* from = tile + i * stride;
    int64_t place = (row + i) * g.c_stride + column, j = 0;
    if (g.c_dtype == DType::bf16) {
      bf16* to = static_cast<bf16*>(g.c) + place;
      for (; j + kLanes <= columns; j += kLanes) {
        vf x = load(from + j);
        store(to + j, bias ? x + load(bias + j) : x);
      }
      for (; j < columns; j++) to[j] = to_bf16(from[j] + (bias ? bias[j] : 0));
    } else {
      float* to = static_cast<float*>(g.c) + place;
#if defined(__AVX512F__)
      if (g.streams && !add && !bias && reinterpret_cast<uintptr_t>(to) % 64 == 0)
        for (; j + kLanes <= columns; j += kLanes) _mm512_stream_ps(to + j, (__m512)load(from + j));
#endif
      for (; j + kLanes <= columns; j += kLanes) {
        vf x = load(from + j);
        if (add) x += load(to + j);
        store(to + j, bias ? x + load(bias + j) : x);
      }
      for (; j < columns; j++) to[j] = (add ? to[j] : 0) + from[j] + (bias ? bias[j] : 0);
    }
  }
}

// K of one product. A block of A that deep stays in the first-level cache while blocks of B come from the second.
int64_t sum_block(const Packing& p) { return p.parts == 3 ? 128 : p.parts == 1 ? 256 : 512; }
constexpr int64_t kCached = int64_t(3) << 18;  // bytes of packed blocks that stay in the second-level cache
constexpr int64_t kFewBlocks = 6;              // of them at least are meant to fit

// C is one of several sums over slabs of K, each of which has its shared operand packed whole.
void gemm_slab(const Gemm& g, const Packing& p, bool add, bool last) {
  const int64_t m_blocks = (g.M + p.block_m - 1) / p.block_m, n_blocks = (g.N + p.block_n - 1) / p.block_n;
  const int64_t sum_depth = sum_block(p), k_blocks = (g.K + sum_depth - 1) / sum_depth;
  // The smaller operand is packed once for all; each task packs its share of the larger one.
  const bool share_a = g.M <= g.N;
  const int64_t shared_blocks = share_a ? m_blocks : n_blocks, own_blocks = share_a ? n_blocks : m_blocks;
  const int64_t a_bytes = p.a_bytes(sum_depth), b_bytes = p.b_bytes(sum_depth);  // of one block, one step of K
  const int64_t shared_bytes = share_a ? a_bytes : b_bytes, own_bytes = share_a ? b_bytes : a_bytes;
  // Packed operands: [steps of K][blocks].
  char* shared = static_cast<char*>(scratch(kPackA, shared_blocks * k_blocks * shared_bytes));

  // Blocks [first, first + count) of A or B, `depth` of K from k on. Where an operand's lines lie beside each other, a
  // strip of K is packed for all blocks in turn: whole runs of memory are read, not a cache line of each row.
  auto pack = [&](bool is_a, int64_t first, int64_t count, int64_t k, int64_t depth, char* to) {
    const bool across = (is_a ? g.a.row_stride : g.b.col_stride) == 1;
    const int64_t strip = across ? kPackStrip : depth;
    for (int64_t at = 0; at < depth; at += strip) {
      const int64_t strip_depth = std::min(strip, depth - at);
      for (int64_t i = 0; i < count; i++) {
        if (is_a) {
          const int64_t row = (first + i) * p.block_m;
          pack_a(p, part(g.a, row, k + at), std::min<int64_t>(p.block_m, g.M - row), strip_depth,
                 to + i * a_bytes + p.a_bytes(at));
        } else {
          const int64_t column = (first + i) * p.block_n;
          pack_b(p, part(g.b, k + at, column), std::min<int64_t>(p.block_n, g.N - column), strip_depth,
                 to + i * b_bytes + p.b_bytes(at));
        }
      }
    }
  };
  const int64_t portion = 16, portions = (shared_blocks + portion - 1) / portion;
  parallel_for(k_blocks * portions, [&](int64_t i) {
    const int64_t kb = i / portions, first = i % portions * portion;
    pack(share_a, first, std::min(portion, shared_blocks - first), kb * sum_depth,
         std::min(sum_depth, g.K - kb * sum_depth), shared + (kb * shared_blocks + first) * shared_bytes);
  });

  // A task's own blocks are packed and meet all shared ones.
  const int64_t wanted = std::max<int64_t>(1, own_blocks / (3 * num_threads()));
  const int64_t group = std::min<int64_t>(wanted, std::max<int64_t>(1, kCached / (k_blocks * own_bytes)));
  parallel_for((own_blocks + group - 1) / group, [&](int64_t task) {
    const int64_t first = task * group, count = std::min(group, own_blocks - first);
    char* own = static_cast<char*>(scratch(kPackB, k_blocks * count * own_bytes));
    for (int64_t kb = 0; kb < k_blocks; kb++)
      pack(!share_a, first, count, kb * sum_depth, std::min(sum_depth, g.K - kb * sum_depth),
           own + kb * count * own_bytes);
    // A block of A meets a panel of blocks of B, whose sums stay in the cache until they are written in whole rows.
    const char *as = share_a ? shared : own, *bs = share_a ? own : shared;
    const int64_t all_a = share_a ? shared_blocks : count, all_b = share_a ? count : shared_blocks;
    const int64_t panel = std::min(all_b, std::clamp<int64_t>(kCached / (k_blocks * b_bytes), 1, 16));
    const int64_t stride = panel * p.block_n;
    float* tiles = static_cast<float*>(scratch(kTile, p.block_m * stride * 4));
    // Sums of one step of K need no second place, where a block's rows are short runs of registers and not AMX's tiles.
    const bool writes_directly = p.parts == 0 && k_blocks == 1 && g.c_dtype == DType::f32 && !g.streams &&
                                 !(last && g.bias);
    for (int64_t j = 0; j < all_b; j += panel)
      for (int64_t i = 0; i < all_a; i++) {
        const int64_t width = std::min(panel, all_b - j);
        const int64_t row = (share_a ? i : first + i) * p.block_m, column = (share_a ? first + j : j) * p.block_n;
        const bool is_whole = row + p.block_m <= g.M && column + width * p.block_n <= g.N;
        const bool is_direct = writes_directly && is_whole;
        float* const sums = is_direct ? static_cast<float*>(g.c) + row * g.c_stride + column : tiles;
        for (int64_t kb = 0; kb < k_blocks; kb++) {
          const int64_t depth = std::min(sum_depth, g.K - kb * sum_depth);
          // The next block of A comes while this one works: waiting for it took a third of the time.
          const char* next = as + (kb + 1 < k_blocks ? (kb + 1) * all_a + i : std::min(i + 1, all_a - 1)) * a_bytes;
          const int64_t ahead = a_bytes / width;
          for (int64_t n = 0; n < width; n++) {
            for (int64_t line = n * ahead; line < (n + 1) * ahead; line += 64) __builtin_prefetch(next + line, 0, 2);
            product(p, as + (kb * all_a + i) * a_bytes, bs + (kb * all_b + j + n) * b_bytes, depth,
                    sums + n * p.block_n, is_direct ? g.c_stride : stride, kb > 0 || (is_direct && add));
          }
        }
        if (is_direct) continue;
        write_tile(g, tiles, stride, row, column, std::min<int64_t>(p.block_m, g.M - row),
                   std::min<int64_t>(width * p.block_n, g.N - column), add, last);
      }
  });
}

}  // namespace

bool bf16_products() { return rounds_products; }

bool has_few_rows(const Gemm& g) { return g.M <= kFewRows && g.b.row_stride == 1 && g.K >= kLanes; }

Packing packing(bool bf16) {
#if defined(__AMX_BF16__)
  const int parts = bf16 ? 1 : 3;
  return {bf16, kTileSide, kTileSide, kTileSide, 2 * parts, parts};
#else
  return bf16 ? Packing{true, kBf16Rows, kBf16Columns, kBf16K, sizeof(Rounded), 0}
              : Packing{false, kRows, kColumns, 1, sizeof(float), 0};
#endif
}

void pack_a(const Packing& p, const Operand& a, int64_t rows, int64_t K, void* packed) {
  if (a.dtype == DType::bf16) {
    pack_a_from(p, static_cast<const bf16*>(a.data), a, rows, K, packed);
  } else {
    pack_a_from(p, static_cast<const float*>(a.data), a, rows, K, packed);
  }
}

void pack_b(const Packing& p, const Operand& b, int64_t columns, int64_t K, void* packed) {
  if (b.dtype == DType::bf16) {
    pack_b_from(p, static_cast<const bf16*>(b.data), b, columns, K, packed);
  } else {
    pack_b_from(p, static_cast<const float*>(b.data), b, columns, K, packed);
  }
}

void product(const Packing& p, const void* a_packed, const void* b_packed, int64_t K, float* tile, int64_t tile_stride,
             bool accumulate) {
  [[maybe_unused]] const bf16 *a = static_cast<const bf16*>(a_packed), *b = static_cast<const bf16*>(b_packed);
#if defined(__AMX_BF16__)
  (p.parts == 1 ? product_tiles<1> : product_tiles<3>)(a, b, K, tile, tile_stride, accumulate);
#else
#if defined(__AVX512BF16__)
  if (p.bf16) return product_bf16(a, b, p.padded_k(K), tile, tile_stride, accumulate);
#endif
  product_f32(static_cast<const float*>(a_packed), static_cast<const float*>(b_packed), K, tile, tile_stride,
              accumulate);
#endif
}

void gemm(const Gemm& g) {
  if (g.M == 0 || g.N == 0) return;
  Gemm whole = g;
  whole.bf16_products = g.bf16_products || (g.a.dtype == DType::bf16 && g.b.dtype == DType::bf16);
  if (g.K == 0) {
    if (!g.accumulate)
      for (int64_t m = 0; m < g.M; m++)
        for (int64_t n = 0; n < g.N; n++) {
          float x = g.bias ? g.bias[n] : 0;
          if (g.c_dtype == DType::bf16) {
            static_cast<bf16*>(g.c)[m * g.c_stride + n] = to_bf16(x);
          } else {
            static_cast<float*>(g.c)[m * g.c_stride + n] = x;
          }
        }
    return;
  }
  if (try_few_rows(whole)) return;
  const Packing p = packing(whole.bf16_products);
  // A slab of K: as much as keeps the packed shared operand small, and some blocks of both in the second-level cache.
  // C in bfloat16 cannot carry sums from one to another.
  const int64_t most = std::min((int64_t(6) << 20) / (p.element_bytes * std::min(g.M, g.N)),
                                kCached / (kFewBlocks * p.element_bytes * p.block_n));
  const int64_t slab = std::max<int64_t>(1, most / sum_block(p)) * sum_block(p);
  if (g.c_dtype == DType::bf16 && g.K > slab) {
    float* sums = static_cast<float*>(scratch(kOther, g.M * g.N * 4));
    Gemm wide = whole;
    wide.c = sums;
    wide.c_dtype = DType::f32;
    wide.c_stride = g.N;
    gemm(wide);
    parallel_blocks(g.M, 16, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; m++)
        copy_run(static_cast<bf16*>(g.c) + m * g.c_stride, sums + m * g.N, g.N);
    });
    return;
  }
  for (int64_t k = 0; k < g.K; k += slab) {
    Gemm part_of = whole;
    part_of.a = part(g.a, 0, k);
    part_of.b = part(g.b, k, 0);
    part_of.K = std::min(slab, g.K - k);
    gemm_slab(part_of, p, g.accumulate || k > 0, k + part_of.K == g.K);
  }
}

}  // namespace pangu

PANGU_EXPORT void pangu_set_bf16_products(int on) { pangu::rounds_products = on != 0; }
