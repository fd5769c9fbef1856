// What the kernels of attention share: the problem as MindSpore's primitives describe it, and e^x of scores.
#pragma once

#include <algorithm>
#include <vector>

#include "gemm.h"
#include "plugin.h"
#include "pairs.h"
#include "vec.h"

namespace pangu {

// A sequence that attends to itself, or a query sequence and a key sequence, of all heads. Offsets are in elements.
struct Document {
  int64_t q_offset, kv_offset, stats_offset;  // of the first token's first head
  int64_t num_queries, num_keys;
  // Query i sees the keys i + first .. i + last that exist.
  int64_t first, last;
  const uint8_t* mask;  // [num_queries, num_keys], nonzero hides; or null
  int64_t mask_head_stride;

  // Keys [begin, end) hold all that queries [from, to) see.
  int64_t begin_of(int64_t from) const { return std::max<int64_t>(0, from + first); }
  int64_t end_of(int64_t to) const { return std::min(num_keys, to + last); }
  // Whether each of the queries [from, to) sees each of the keys [begin, end), but for `mask`.
  bool all_seen(int64_t from, int64_t to, int64_t begin, int64_t end) const {
    return begin >= to - 1 + first && end <= end_of(from + 1);
  }
};

struct Attention {
  int64_t num_heads, num_kv_heads, group, head_dim;
  int64_t q_token, kv_token, q_head, kv_head;  // strides
  int64_t stats_token, stats_head;
  float scale;
  DType dtype;
  Packing packing;
  std::vector<Document> documents;

};

inline int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }
inline const char* element(const void* data, DType dtype, int64_t offset) {
  return static_cast<const char*>(data) + offset * size_of(dtype);
}

// softmax_max and softmax_sum hold each number this many times.
constexpr int64_t kStatsCopies = 8;

// Position of the first optional input, and of the scalars, in FlashAttentionScore's and ...Grad's inputs.
struct AttentionInputs {
  int real_shift, drop_mask, padding_mask, mask, prefix, q_ends, kv_ends, scalars;
};
// Raises Error for what the kernels don't serve.
Attention read_attention(const Call& call, const AttentionInputs& inputs);

// Hides scores from queries [from, from + queries) x keys [begin, begin + keys) by -inf; score(i, j) is at
// scores[i * query_step + j * key_step].
void hide(const Document& d, int64_t head, int64_t from, int64_t queries, int64_t begin, int64_t keys, float* scores,
          int64_t query_step, int64_t key_step);

// The first `columns` columns of a tile to rows of an f32 or bf16 tensor, each times its factor; tile and factors have
// block_n of them.
void write_transposed(const float* tile, int64_t stride, int64_t rows, int64_t columns, const float* factors, void* to,
                      DType dtype, int64_t to_stride);

constexpr float kLog2E = 1.44269504088896341f;

// 2^x for x <= 0, where what is positive counts as 0; 0 for -inf, NaN stays NaN. coarse: to 3e-6 of the value, for what
// is rounded to bfloat16 next; otherwise to 2e-7.
template <bool coarse>
inline vf exp2_of_nonpositive(vf x) {
#if defined(__AVX512F__)
  const __m512 t = _mm512_min_ps(_mm512_setzero_ps(), (__m512)x);  // in this order NaN passes
  const vf r = (vf)_mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // t minus its floor
  vf p;
  if constexpr (coarse) {  // minimax in the relative error, on [0, 1)
    p = r * 0.013534167781472206f + 0.05201146379113197f;
    p = p * r + 0.2414427548646927f;
    p = p * r + 0.6930038332939148f;
    p = p * r + 1.0000026226043701f;
  } else {
    p = r * 2.1702254889532924e-4f + 1.2439688434824347e-3f;
    p = p * r + 9.678840637207031e-3f;
    p = p * r + 5.5483341217041016e-2f;
    p = p * r + 0.24022983014583588f;
    p = p * r + 0.6931470036506653f;
    p = p * r + 1.0f;
  }
  return (vf)_mm512_scalef_ps((__m512)p, t);
#else
  const vf low = splat(-126.5f), high = splat(0.0f);
  const vi vanishes = x < low;
  x = vanishes ? low : x;
  x = high < x ? high : x;
  const vf shifted = x + 12583039.0f;  // 1.5 * 2^23 + 127: rounds, and leaves the biased exponent in the lowest bits
  const vf r = x - (shifted - 12583039.0f);
  vf p = splat(1.535336188319500e-4f);  // Cephes (S. Moshier), on [-0.5, 0.5]
  p = p * r + 1.339887440266574e-3f;
  p = p * r + 9.618437357674640e-3f;
  p = p * r + 5.550332471162809e-2f;
  p = p * r + 2.402264791363012e-1f;
  p = p * r + 6.931472028550421e-1f;
  p = p * r + 1.0f;
  return vanishes ? vf{} : p * as_float(as_int(shifted) << 23);
#endif
}

}  // namespace pangu
