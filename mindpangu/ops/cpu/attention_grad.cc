// FlashAttentionScoreGrad: probabilities computed again in blocks from the stored maxima and sums.
// Source: Dao et al., FlashAttention-2, arXiv:2307.08691, algorithm 2, with the loop over queries outside: a task keeps
// the sums of dk and dv of one head of one document, and a block of dq is finished before the next one begins.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "attention.h"
#include "types.h"

namespace pangu {

namespace {

struct Free {
  void operator()(char* memory) const { std::free(memory); }
};

// One key/value head of one document, or every num_splits-th of its query blocks.
struct Share {
  const Document* document;
  int64_t head, split, num_splits;
  float* sums;  // of dk and dv, where several shares are added up later; or null
};

// Sums over the elements of two rows of n.
template <typename T>
float dot(const T* x, const T* y, int64_t n) {
  vf sum{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sum += load(x + i) * load(y + i);
  if (i < n) sum += load_part(x + i, n - i) * load_part(y + i, n - i);
  return reduce_sum(sum);
}

struct Backward {
  const Attention& a;
  const void *q, *k, *v, *dy, *out;
  const float *max, *sum;
  void *dq, *dk, *dv;

  const Packing& p = a.packing;
  const int64_t bm = p.block_m, bn = p.block_n, H = a.head_dim;
  const int64_t block_q = round_up(128, bm), block_k = round_up(128, bn);
  const int64_t panels = block_k / bn, row_blocks = block_q / bm;
  const int64_t h_blocks = (H + bm - 1) / bm, h_panels = (H + bn - 1) / bn;
  // Of one block of keys: K^T and V^T as right operands, K as right operand of dS K, sums of dk^T and dv^T.
  const int64_t k_bytes = panels * p.b_bytes(H), k_rows_bytes = h_panels * p.b_bytes(block_k);
  const int64_t packed_bytes = 2 * k_bytes + k_rows_bytes;
  const int64_t panel_floats = h_blocks * bm * bn, sums_floats = panels * panel_floats;

  const bool packs_right = p.bf16 || p.parts > 0;  // else the probabilities' layout is that of the scores

  int64_t num_key_blocks(const Document& d) const { return (d.num_keys + block_k - 1) / block_k; }
  int64_t num_query_blocks(const Document& d) const { return (d.num_queries + block_q - 1) / block_q; }

  void pack_keys(const Share& x, int64_t j, char* to) const {
    const Document& d = *x.document;
    const int64_t begin = j * block_k, keys = std::min(block_k, d.num_keys - begin);
    const int64_t offset = d.kv_offset + x.head * a.kv_head + begin * a.kv_token;
    for (int64_t c = 0; c * bn < keys; c++) {
      const int64_t n = std::min(bn, keys - c * bn), place = offset + c * bn * a.kv_token;
      pack_b(p, {element(k, a.dtype, place), a.dtype, 1, a.kv_token}, n, H, to + c * p.b_bytes(H));
      pack_b(p, {element(v, a.dtype, place), a.dtype, 1, a.kv_token}, n, H, to + k_bytes + c * p.b_bytes(H));
    }
    to += 2 * k_bytes;
    // All of block_k keys count in the product, so that missing ones have to be zeros.
    if (keys < block_k) std::memset(to, 0, k_rows_bytes);
    for (int64_t h = 0; h < h_panels; h++)
      pack_b(p, {element(k, a.dtype, offset + h * bn), a.dtype, a.kv_token, 1}, std::min(bn, H - h * bn), keys,
             to + h * p.b_bytes(block_k));
  }

  void run_share(const Share& x) const {
    const Document& d = *x.document;
    const int64_t key_blocks = num_key_blocks(d);
    const int64_t bytes = packed_bytes + (x.sums ? 0 : 8 * sums_floats);
    char* packed = static_cast<char*>(scratch(kAttention, key_blocks * bytes));
    float* sums = x.sums ? x.sums : reinterpret_cast<float*>(packed + key_blocks * packed_bytes);
    for (int64_t j = 0; j < key_blocks; j++) pack_keys(x, j, packed + j * packed_bytes);
    std::memset(sums, 0, key_blocks * 8 * sums_floats);
    for (int64_t i = x.split; i < num_query_blocks(d); i += x.num_splits)
      for (int64_t g = 0; g < a.group; g++) add_queries(x, x.head * a.group + g, i * block_q, packed, sums);
    if (x.sums == nullptr)
      for (int64_t j = 0; j < key_blocks; j++) write_keys(x, j, sums + j * 2 * sums_floats);
  }

  void write_keys(const Share& x, int64_t j, const float* sums) const {
    const Document& d = *x.document;
    float scales[64], ones[64];
    for (int64_t i = 0; i < bn; i++) {
      scales[i] = a.scale;
      ones[i] = 1;
    }
    for (int64_t c = 0; c < panels; c++) {
      const int64_t key = j * block_k + c * bn, n = std::min(bn, d.num_keys - key);
      if (n <= 0) break;
      const int64_t place = d.kv_offset + x.head * a.kv_head + key * a.kv_token;
      write_transposed(sums + c * panel_floats, bn, H, n, scales,
                       const_cast<char*>(element(dk, a.dtype, place)), a.dtype, a.kv_token);
      write_transposed(sums + sums_floats + c * panel_floats, bn, H, n, ones,
                       const_cast<char*>(element(dv, a.dtype, place)), a.dtype, a.kv_token);
    }
  }

  // Scores and dy v^T of rows [begin, end) and bn keys to probabilities and the scores' gradients: right operands of
  // the sums over queries, from row `begin` on (float32's are w and ds), and left ones for the sum over keys.
  template <int parts>
  void softmax_gradient(float* w, float* ds, int64_t begin, int64_t end, const float* top, const float* per_total,
                        const float* dy_out, char* w_right, char* ds_right, char* ds_left) const {
    const float scale = a.scale * kLog2E;
    const int64_t width = bn;
    auto probability = [&](int64_t row, int64_t e) {
      return exp2_of_nonpositive<parts == 1>(load(w + e) * scale - top[row]) * per_total[row];
    };
    bool left_done = false;
#if defined(__AVX512BF16__)
    if constexpr (kInPairs<parts>) {
      for (int64_t r = begin; r < end; r += 2) {  // rows come in blocks of an even number
        vf p[2][2], gradient[2][2];
        for (int i = 0; i < 2; i++)
          for (int j = 0; j < 2; j++) {
            const int64_t row = r + i, e = row * width + j * kLanes;
            p[i][j] = probability(row, e);
            gradient[i][j] = p[i][j] * (load(ds + e) - dy_out[row]);
          }
        for (int j = 0; j < 2; j++) {
          store_right<parts>(w_right, r - begin, j * kLanes, p[0][j], p[1][j]);
          store_right<parts>(ds_right, r - begin, j * kLanes, gradient[0][j], gradient[1][j]);
        }
        for (int i = 0; i < 2; i++) {
#if defined(__AMX_BF16__)
          store_left<parts>(ds_left + r / bm * this->p.a_bytes(block_k), r % bm + i, gradient[i][0], gradient[i][1]);
          left_done = true;
#else
          for (int j = 0; j < 2; j++) store(ds + (r + i) * width + j * kLanes, gradient[i][j]);
#endif
        }
      }
    }
#endif
    if constexpr (!kInPairs<parts>) {
      for (int64_t r = begin; r < end; r++)
        for (int64_t e = r * width; e < (r + 1) * width; e += kLanes) {
          const vf p = probability(r, e);
          store(w + e, p);
          store(ds + e, p * (load(ds + e) - dy_out[r]));
        }
      if (p.bf16) {
        pack_b(p, {w + begin * width, DType::f32, width, 1}, width, end - begin, w_right);
        pack_b(p, {ds + begin * width, DType::f32, width, 1}, width, end - begin, ds_right);
      }
    }
    for (int64_t r = begin; r < end && !left_done; r += bm)
      pack_a(p, {ds + r * width, DType::f32, width, 1}, bm, width, ds_left + r / bm * p.a_bytes(block_k));
  }

  // Queries [from, from + block_q) of one head: their dq whole, and their part of dk and dv.
  void add_queries(const Share& x, int64_t head, int64_t from, const char* packed, float* sums) const {
    const Document& d = *x.document;
    const int64_t queries = std::min(block_q, d.num_queries - from), to = from + queries;
    const int64_t blocks = (queries + bm - 1) / bm, rows = blocks * bm;
    const int64_t line_bytes = p.a_bytes(H), column_bytes = p.a_bytes(block_q);
    const int64_t tile_floats = block_q * block_k;
    const int64_t left_bytes = row_blocks * line_bytes, across_bytes = h_blocks * column_bytes;
    const int64_t right_bytes = packs_right ? panels * p.b_bytes(block_q) : 0;
    char* memory = static_cast<char*>(
        scratch(kSoftmax, 2 * left_bytes + 2 * across_bytes + 8 * tile_floats + 2 * right_bytes +
                              row_blocks * p.a_bytes(block_k) + 4 * h_panels * block_q * bn + 12 * block_q + 64 * 8));
    auto take = [&](int64_t bytes) {
      char* taken = memory;
      memory += round_up(bytes, 64);
      return taken;
    };
    // Left operands: queries and dy by rows, for the scores; and by columns, for the sums over queries.
    char *q_rows = take(left_bytes), *dy_rows = take(left_bytes);
    char *q_columns = take(across_bytes), *dy_columns = take(across_bytes);
    float* weights = reinterpret_cast<float*>(take(4 * tile_floats));
    float* dscores = reinterpret_cast<float*>(take(4 * tile_floats));
    char *weights_right = take(right_bytes), *dscores_right = take(right_bytes);
    char* dscores_left = take(row_blocks * p.a_bytes(block_k));
    float* dq_sums = reinterpret_cast<float*>(take(4 * h_panels * block_q * bn));
    float* top = reinterpret_cast<float*>(take(12 * block_q));
    float *per_total = top + block_q, *dy_out = per_total + block_q;

    const int64_t offset = d.q_offset + head * a.q_head + from * a.q_token;
    for (int64_t i = 0; i < blocks; i++) {
      const int64_t n = std::min(bm, queries - i * bm), place = offset + i * bm * a.q_token;
      pack_a(p, {element(q, a.dtype, place), a.dtype, a.q_token, 1}, n, H, q_rows + i * line_bytes);
      pack_a(p, {element(dy, a.dtype, place), a.dtype, a.q_token, 1}, n, H, dy_rows + i * line_bytes);
    }
    if (queries < rows) {  // the sums run over whole blocks of queries
      std::memset(q_columns, 0, across_bytes);
      std::memset(dy_columns, 0, across_bytes);
    }
    for (int64_t i = 0; i < h_blocks; i++) {
      const int64_t n = std::min(bm, H - i * bm), place = offset + i * bm;
      pack_a(p, {element(q, a.dtype, place), a.dtype, 1, a.q_token}, n, queries, q_columns + i * column_bytes);
      pack_a(p, {element(dy, a.dtype, place), a.dtype, 1, a.q_token}, n, queries, dy_columns + i * column_bytes);
    }
    for (int64_t r = 0; r < rows; r++) {
      top[r] = per_total[r] = dy_out[r] = 0;
      if (r >= queries) continue;
      const int64_t stats = d.stats_offset + head * a.stats_head + (from + r) * a.stats_token;
      const char* y = element(out, a.dtype, offset + r * a.q_token);
      const char* dy_row = element(dy, a.dtype, offset + r * a.q_token);
      top[r] = max[stats] * kLog2E;
      per_total[r] = sum[stats] == 0 ? 0 : 1 / sum[stats];
      dy_out[r] = a.dtype == DType::bf16
                      ? dot(reinterpret_cast<const bf16*>(y), reinterpret_cast<const bf16*>(dy_row), H)
                      : dot(reinterpret_cast<const float*>(y), reinterpret_cast<const float*>(dy_row), H);
    }
    std::memset(dq_sums, 0, 4 * h_panels * block_q * bn);

    for (int64_t j = d.begin_of(from) / block_k; j * block_k < d.end_of(to); j++) {
      const char *k_packed = packed + j * packed_bytes, *v_packed = k_packed + k_bytes, *k_rows = v_packed + k_bytes;
      float *dk_sums = sums + j * 2 * sums_floats, *dv_sums = dk_sums + sums_floats;
      // Panel c's scores are seen from row block first[c] on.
      int64_t first[64], num_panels = 0;
      for (int64_t c = 0; c < panels; c++) {
        const int64_t key = j * block_k + c * bn;
        int64_t i = 0;
        while (i < blocks && d.end_of(std::min(to, from + (i + 1) * bm)) <= key) i++;
        if (i == blocks) break;
        first[num_panels++] = i;
        float *w = weights + c * block_q * bn, *ds = dscores + c * block_q * bn;
        for (int64_t b = i; b < blocks; b++) {
          product(p, q_rows + b * line_bytes, k_packed + c * p.b_bytes(H), H, w + b * bm * bn, bn, false);
          product(p, dy_rows + b * line_bytes, v_packed + c * p.b_bytes(H), H, ds + b * bm * bn, bn, false);
        }
        const int64_t row = i * bm;
        if (d.mask != nullptr || !d.all_seen(from + row, to, key, key + bn))
          hide(d, head, from + row, rows - row, key, bn, w + row * bn, bn, 1);
        const char *w_right = reinterpret_cast<const char*>(w + row * bn);
        const char* ds_right = reinterpret_cast<const char*>(ds + row * bn);
        if (packs_right) {
          w_right = weights_right + c * p.b_bytes(block_q);
          ds_right = dscores_right + c * p.b_bytes(block_q);
        }
        auto gradient = p.bf16 ? &Backward::softmax_gradient<1> : &Backward::softmax_gradient<3>;
        (this->*gradient)(w, ds, row, rows, top, per_total, dy_out, const_cast<char*>(w_right),
                          const_cast<char*>(ds_right), dscores_left + c * p.a_bytes(bn));
        const int64_t skipped = row * bm * p.element_bytes;
        for (int64_t h = 0; h < h_blocks; h++) {
          const int64_t place = c * panel_floats + h * bm * bn, across = h * column_bytes + skipped;
          product(p, dy_columns + across, w_right, rows - row, dv_sums + place, bn, true);
          product(p, q_columns + across, ds_right, rows - row, dk_sums + place, bn, true);
        }
      }
      for (int64_t b = 0; b < blocks; b++) {
        int64_t seen = 0;
        while (seen < num_panels && first[seen] <= b) seen++;
        if (seen == 0) continue;
        for (int64_t h = 0; h < h_panels; h++)
          product(p, dscores_left + b * p.a_bytes(block_k), k_rows + h * p.b_bytes(block_k), seen * bn,
                  dq_sums + (h * block_q + b * bm) * bn, bn, true);
      }
    }

    for (int64_t r = 0; r < queries; r++)
      for (int64_t h = 0; h < H; h += kLanes) {
        const float* from_sums = dq_sums + (h / bn * block_q + r) * bn + h % bn;
        const vf value = load(from_sums) * a.scale;
        const int64_t place = offset + r * a.q_token + h;
        const int n = static_cast<int>(std::min<int64_t>(kLanes, H - h));
        if (a.dtype == DType::bf16) {
          store_part(static_cast<bf16*>(dq) + place, value, n);
        } else {
          store_part(static_cast<float*>(dq) + place, value, n);
        }
      }
  }

  void run() const {
    double total = 0;
    for (const Document& d : a.documents) total += double(a.num_kv_heads) * d.num_queries * d.num_keys;
    std::vector<Share> shares, split;
    std::vector<std::unique_ptr<char, Free>> memory;
    for (const Document& d : a.documents)
      for (int64_t m = 0; m < a.num_kv_heads; m++) {
        // A head that is more than a fifth of the work is shared, by its size and not by the number of threads, so that
        // the order of summation stays the same.
        const double part = total > 0 ? double(d.num_queries) * d.num_keys / total : 0;
        const int64_t num = part <= 0.2 ? 1 : std::clamp<int64_t>(num_query_blocks(d), 1, int64_t(8 * part));
        const int64_t floats = num_key_blocks(d) * 2 * sums_floats;
        float* sums = nullptr;
        if (num > 1) {
          memory.emplace_back(static_cast<char*>(std::aligned_alloc(4096, round_up(num * floats * 4, 4096))));
          if (!memory.back()) throw Error("FlashAttentionScoreGrad on CPU: no memory for the sums of dk and dv.");
          sums = reinterpret_cast<float*>(memory.back().get());
          split.push_back({&d, m, 0, num, sums});
        }
        for (int64_t s = 0; s < num; s++) shares.push_back({&d, m, s, num, sums ? sums + s * floats : nullptr});
      }
    std::stable_sort(shares.begin(), shares.end(), [](const Share& x, const Share& y) {
      return x.document->num_queries * x.document->num_keys / x.num_splits >
             y.document->num_queries * y.document->num_keys / y.num_splits;
    });
    parallel_for(shares.size(), [&](int64_t i) { run_share(shares[i]); });
    for (const Share& x : split)
      parallel_for(num_key_blocks(*x.document), [&](int64_t j) {
        float* first = x.sums + j * 2 * sums_floats;
        const int64_t floats = num_key_blocks(*x.document) * 2 * sums_floats;
        for (int64_t s = 1; s < x.num_splits; s++)
          for (int64_t i = 0; i < 2 * sums_floats; i += kLanes)
            store(first + i, load(first + i) + load(first + s * floats + i));
        write_keys(x, j, first);
      });
  }
};

}  // namespace

// query, key, value, dy, pse_shift, drop_mask, padding_mask, atten_mask, softmax_max, softmax_sum, softmax_in,
// attention_in, prefix, actual_seq_qlen, actual_seq_kvlen, scalars -> dq, dk, dv, dpse (not used)
static void score_grad(const Call& call) {
  const Attention a = read_attention(call, {4, 5, 6, 7, 12, 13, 14, 15});
  const Tensor q = call[0];
  expect_dtype(call, 3, "dy", a.dtype);
  expect(shape_of(call[3]) == shape_of(q), call, "dy", shape_of(call[3]), "the shape of query, " + shape_of(q));
  expect_dtype(call, 11, "attention_in", a.dtype);
  expect(shape_of(call[11]) == shape_of(q), call, "attention_in", shape_of(call[11]),
         "the shape of query, " + shape_of(q));
  const char* names[] = {"softmax_max", "softmax_sum"};
  for (int i = 0; i < 2; i++) {
    expect_dtype(call, 8 + i, names[i], DType::f32);
    expect(call[8 + i].size() == q.size() / a.head_dim * kStatsCopies, call, names[i], shape_of(call[8 + i]),
           std::to_string(kStatsCopies) + " numbers for each of query's heads");
  }
  Backward{a, q.data, call[1].data, call[2].data, call[3].data, call[11].data, call[8].as<float>(), call[9].as<float>(),
           call[23].data, call[24].data, call[25].data}
      .run();
}

// float16, which mindformers hands to attention, is widened and rounded back.
PANGU_PRIMITIVE(FlashAttentionScoreGrad) {
  if (call[0].dtype == DType::f16) {
    in_float32(call, score_grad);
  } else {
    score_grad(call);
  }
}

}  // namespace pangu
