// FlashAttentionScore: attention in blocks with a running softmax, so that scores never exist as a whole.
// Source: Dao et al., FlashAttention-2, arXiv:2307.08691, algorithm 1.
#include "attention.h"

#include <algorithm>
#include <cstring>

#include "types.h"

namespace pangu {

namespace {

enum Layout { kBSH, kBNSD, kSBH, kBSND, kTND };  // MindSpore's numbers

constexpr int64_t kAll = int64_t(1) << 40;
// A row that has seen nothing; finite in base 2 too, so that differences never are inf - inf.
constexpr float kNothing = -2e38f;

std::vector<int64_t> read_ends(const Call& call, int input, const char* name, int64_t num_tokens) {
  const Tensor ends = call[input];
  expect(ends.dtype != DType::none, call, name, "missing", "cumulative lengths with input_layout TND");
  expect_dtype(call, input, name, DType::i64);
  std::vector<int64_t> lengths(ends.as<int64_t>(), ends.as<int64_t>() + (ends.data ? ends.size() : 0));
  for (size_t i = 0; i < lengths.size(); i++) {
    int64_t before = i ? lengths[i - 1] : 0;
    expect(lengths[i] >= before, call, name, std::to_string(lengths[i]) + " after " + std::to_string(before),
           "non-decreasing cumulative lengths");
  }
  int64_t last = lengths.empty() ? 0 : lengths.back();
  expect(last == num_tokens, call, name, "ending with " + std::to_string(last),
         "the number of tokens, " + std::to_string(num_tokens) + ", at the end");
  return lengths;
}

}  // namespace

Attention read_attention(const Call& call, const AttentionInputs& inputs) {
  const Tensor q = call[0], k = call[1], v = call[2];
  const char* names[] = {"query", "key", "value"};
  for (int i = 0; i < 3; i++) {
    expect_float(call, i, names[i]);
    expect_dtype(call, i, names[i], q.dtype);
  }
  const std::pair<int, const char*> absent[] = {{inputs.real_shift, "real_shift"}, {inputs.drop_mask, "drop_mask"},
                                                {inputs.padding_mask, "padding_mask"}, {inputs.prefix, "prefix"}};
  for (auto [input, name] : absent)
    expect(call[input].dtype == DType::none, call, name, "given", "None: the CPU kernel doesn't serve it");
  Scalars& given = scalars(call);
  const int at = inputs.scalars;
  const double keep_prob = given.GetFloatInput(at + 1);
  expect(keep_prob == 1.0, call, "keep_prob", std::to_string(keep_prob), "1: the CPU kernel has no dropout");
  const int64_t before = given.GetIntInput(at + 3), after = given.GetIntInput(at + 4);
  const int64_t layout = given.GetIntInput(at + 6), mode = given.GetIntInput(at + 7);
  expect(layout >= kBSH && layout <= kTND, call, "input_layout", std::to_string(layout),
         "BSH, BNSD, SBH, BSND or TND");
  expect(mode >= 0 && mode <= 4, call, "sparse_mode", std::to_string(mode), "0 to 4");

  Attention a;
  a.num_heads = given.GetIntInput(at);
  a.scale = static_cast<float>(given.GetFloatInput(at + 2));
  expect(a.scale > 0, call, "scale_value", std::to_string(a.scale), "more than 0");
  a.dtype = q.dtype;
  a.packing = packing(q.dtype == DType::bf16 || bf16_products());
  const int rank = layout == kBSH || layout == kSBH || layout == kTND ? 3 : 4;
  for (int i = 0; i < 3; i++)
    expect(call[i].rank == rank, call, names[i], shape_of(call[i]), std::to_string(rank) + " axes");
  expect(shape_of(v) == shape_of(k), call, "value", shape_of(v), "the shape of key, " + shape_of(k));
  expect(a.num_heads > 0, call, "head_num", std::to_string(a.num_heads), "more than 0");

  int64_t batch = 1, num_queries = 0, num_keys = 0, q_batch = 0, kv_batch = 0, kv_head_dim = 0;
  if (layout == kBSH || layout == kSBH) {
    expect(q.dim(2) % a.num_heads == 0 && q.dim(2) > 0, call, "query", shape_of(q), "a last axis of head_num heads");
    a.head_dim = kv_head_dim = q.dim(2) / a.num_heads;
    expect(k.dim(2) % a.head_dim == 0, call, "key", shape_of(k), "heads of " + std::to_string(a.head_dim));
    a.num_kv_heads = k.dim(2) / a.head_dim;
  } else {
    const int axis = layout == kBNSD || layout == kTND ? 1 : 2;
    expect(q.dim(axis) == a.num_heads, call, "query", shape_of(q), std::to_string(a.num_heads) + " heads (head_num)");
    a.num_kv_heads = k.dim(axis);
    a.head_dim = q.dim(-1);
    kv_head_dim = k.dim(-1);
  }
  expect(kv_head_dim == a.head_dim && a.head_dim > 0, call, "key", shape_of(k),
         "query's head size, " + std::to_string(a.head_dim));
  expect(a.num_kv_heads > 0 && a.num_heads % a.num_kv_heads == 0, call, "head_num", std::to_string(a.num_heads),
         "a multiple of the number of key/value heads, " + std::to_string(a.num_kv_heads));
  a.group = a.num_heads / a.num_kv_heads;
  const int64_t q_width = a.num_heads * a.head_dim, kv_width = a.num_kv_heads * a.head_dim;
  a.q_head = a.kv_head = a.head_dim;
  a.q_token = q_width;
  a.kv_token = kv_width;
  if (layout == kTND) {
    num_queries = q.dim(0);
    num_keys = k.dim(0);
  } else {
    const int batch_axis = layout == kSBH ? 1 : 0, token_axis = layout == kSBH ? 0 : layout == kBNSD ? 2 : 1;
    batch = q.dim(batch_axis);
    num_queries = q.dim(token_axis);
    num_keys = k.dim(token_axis);
    expect(k.dim(batch_axis) == batch, call, "key", shape_of(k), "a batch of " + std::to_string(batch));
    q_batch = num_queries * q_width;
    kv_batch = num_keys * kv_width;
    if (layout == kSBH) {
      a.q_token = batch * q_width;
      a.kv_token = batch * kv_width;
      q_batch = q_width;
      kv_batch = kv_width;
    } else if (layout == kBNSD) {
      a.q_token = a.kv_token = a.head_dim;
      a.q_head = num_queries * a.head_dim;
      a.kv_head = num_keys * a.head_dim;
    }
  }
  a.stats_token = layout == kTND ? a.num_heads * kStatsCopies : kStatsCopies;
  a.stats_head = layout == kTND ? kStatsCopies : num_queries * kStatsCopies;

  const Tensor mask = call[inputs.mask];
  // In the other modes the mask is one triangle for all, which the mode implies: it isn't read.
  const bool masked = mode <= 1 && mask.dtype != DType::none;
  int64_t mask_batch = 0, mask_head = 0;
  if (masked) {
    expect(layout != kTND, call, "attn_mask", "given", "None with input_layout TND and sparse_mode 0 or 1");
    expect(mask.dtype == DType::boolean || mask.dtype == DType::u8, call, "attn_mask", name_of(mask.dtype),
           "bool or uint8");
    const bool fits = (mask.rank == 2 || (mask.rank == 4 && (mask.dim(0) == batch || mask.dim(0) == 1) &&
                                          (mask.dim(1) == 1 || mask.dim(1) == a.num_heads))) &&
                      mask.dim(-1) == num_keys && mask.dim(-2) == num_queries;
    expect(fits, call, "attn_mask", shape_of(mask),
           "[" + std::to_string(num_queries) + ", " + std::to_string(num_keys) + "], with or without [B, 1 or N]");
    if (mask.rank == 4) {
      mask_head = mask.dim(1) == 1 ? 0 : num_queries * num_keys;
      mask_batch = mask.dim(0) == 1 ? 0 : mask.dim(1) * num_queries * num_keys;
    }
  }
  auto add = [&](int64_t q_offset, int64_t kv_offset, int64_t stats, int64_t queries, int64_t keys, int64_t b) {
    Document d{q_offset, kv_offset, stats, queries, keys, -kAll, kAll, nullptr, mask_head};
    const int64_t shift = mode >= 3 ? keys - queries : 0;  // 3 and 4 count from the last query and the last key
    if (mode == 2 || mode == 3) d.last = shift;
    if (mode == 4 || (mode == 0 && masked)) {
      d.first = shift - std::min(before, kAll);
      d.last = shift + std::min(after, kAll);
    }
    if (masked) d.mask = mask.as<uint8_t>() + b * mask_batch;
    if (queries > 0 || keys > 0) a.documents.push_back(d);
  };
  if (layout == kTND) {
    const std::vector<int64_t> q_ends = read_ends(call, inputs.q_ends, "actual_seq_qlen", num_queries);
    const std::vector<int64_t> kv_ends = read_ends(call, inputs.kv_ends, "actual_seq_kvlen", num_keys);
    expect(q_ends.size() == kv_ends.size(), call, "actual_seq_kvlen", std::to_string(kv_ends.size()) + " long",
           "as long as actual_seq_qlen, " + std::to_string(q_ends.size()));
    int64_t q_start = 0, kv_start = 0;
    for (size_t i = 0; i < q_ends.size(); i++) {
      add(q_start * a.q_token, kv_start * a.kv_token, q_start * a.stats_token, q_ends[i] - q_start,
          kv_ends[i] - kv_start, 0);
      q_start = q_ends[i];
      kv_start = kv_ends[i];
    }
  } else {
    for (int64_t b = 0; b < batch; b++)
      add(b * q_batch, b * kv_batch, b * a.num_heads * a.stats_head, num_queries, num_keys, b);
  }
  return a;
}

void hide(const Document& d, int64_t head, int64_t from, int64_t queries, int64_t begin, int64_t keys, float* scores,
          int64_t query_step, int64_t key_step) {
  for (int64_t i = 0; i < queries; i++) {
    const int64_t query = from + i;
    float* row = scores + i * query_step;
    const int64_t first = std::clamp<int64_t>(query + d.first - begin, 0, keys);
    const int64_t end = std::clamp<int64_t>(d.end_of(query + 1) - begin, 0, keys);
    for (int64_t j = 0; j < std::min(first, keys); j++) row[j * key_step] = -INFINITY;
    for (int64_t j = end; j < keys; j++) row[j * key_step] = -INFINITY;
    if (d.mask == nullptr || query >= d.num_queries) continue;
    const uint8_t* hidden = d.mask + head * d.mask_head_stride + query * d.num_keys + begin;
    for (int64_t j = first; j < end; j++)
      if (hidden[j]) row[j * key_step] = -INFINITY;
  }
}

namespace {

template <typename To>
void write_transposed_as(const float* tile, int64_t stride, int64_t rows, int64_t columns, const float* factors, To* to,
                         int64_t to_stride) {
  for (int64_t j = 0; j < columns; j += kLanes) {
    const vf factor = load(factors + j);
    const int n = static_cast<int>(std::min<int64_t>(kLanes, columns - j));
    for (int64_t i = 0; i < rows; i += kLanes) {
      const int m = static_cast<int>(std::min<int64_t>(kLanes, rows - i));
      vf r[kLanes];
      for (int s = 0; s < kLanes; s++) r[s] = s < m ? load(tile + (i + s) * stride + j) * factor : vf{};
      transpose(r);
      To* place = to + j * to_stride + i;
      for (int s = 0; s < n; s++, place += to_stride) {
        if (m == kLanes) {
          store(place, r[s]);
        } else {
          store_part(place, r[s], m);
        }
      }
    }
  }
}

}  // namespace

void write_transposed(const float* tile, int64_t stride, int64_t rows, int64_t columns, const float* factors, void* to,
                      DType dtype, int64_t to_stride) {
  if (dtype == DType::bf16) {
    write_transposed_as(tile, stride, rows, columns, factors, static_cast<bf16*>(to), to_stride);
  } else {
    write_transposed_as(tile, stride, rows, columns, factors, static_cast<float*>(to), to_stride);
  }
}

namespace {

// Keys of one running-softmax step: scores and probabilities of block_n queries stay in the first-level cache.
int64_t keys_per_step(const Packing& p) { return round_up(p.parts > 0 ? 128 : 96, p.block_m); }
constexpr int64_t kStepsPerSweep = 4;  // what all queries of a task meet before the next keys come
// Queries of a task: of a document whose keys exceed the second-level cache more of them share what is read.
int64_t queries_per_task(const Document& d) { return d.num_keys > 4096 ? 512 : 128; }
constexpr int64_t kPackedBytes = int64_t(32) << 20;  // of keys and values at a time, or one head of one document

// One head's keys and values of one document, packed as left operands: K [keys, H] and V^T [H, keys of a step].
struct PackedHead {
  const Document* document;
  int64_t head;  // of keys and values
  char *k, *v;
};

struct Forward {
  const Attention& a;
  const void *q, *k, *v;
  void* out;
  float *max, *sum;

  const Packing& p = a.packing;
  const int64_t bm = p.block_m, bn = p.block_n, step = keys_per_step(p);
  const int64_t h_blocks = (a.head_dim + bm - 1) / bm;
  const int64_t score_bytes = round_up(4 * step * bn + p.b_bytes(step), 64);  // scores and weights of a step
  const int64_t k_step_bytes = step / bm * p.a_bytes(a.head_dim), v_step_bytes = h_blocks * p.a_bytes(step);

  int64_t num_steps(const Document& d) const { return (d.num_keys + step - 1) / step; }
  int64_t bytes(const Document& d) const { return num_steps(d) * (k_step_bytes + v_step_bytes); }

  void pack(const PackedHead& x, int64_t s) const {
    const Document& d = *x.document;
    const int64_t begin = s * step, keys = std::min(step, d.num_keys - begin);
    const int64_t offset = d.kv_offset + x.head * a.kv_head + begin * a.kv_token;
    for (int64_t i = 0; i * bm < keys; i++) {
      Operand rows{element(k, a.dtype, offset + i * bm * a.kv_token), a.dtype, a.kv_token, 1};
      pack_a(p, rows, std::min(bm, keys - i * bm), a.head_dim, x.k + s * k_step_bytes + i * p.a_bytes(a.head_dim));
    }
    for (int64_t i = 0; i < h_blocks; i++) {
      Operand columns{element(v, a.dtype, offset + i * bm), a.dtype, 1, a.kv_token};
      pack_a(p, columns, std::min(bm, a.head_dim - i * bm), keys, x.v + s * v_step_bytes + i * p.a_bytes(step));
    }
  }

  // bn queries of one head at work.
  struct Block {
    int64_t head, query, queries;
    char* q;                     // packed
    float *tops, *totals, *sums;  // [bn] maxima and sums of exponentials so far, [H][bn] sums of values
  };

  // Queries [from, to) of all heads that share x's keys.
  void attend(const PackedHead& x, int64_t from, int64_t to) const {
    const Document& d = *x.document;
    const int64_t num = (to - from + bn - 1) / bn * a.group;
    const int64_t q_bytes = round_up(p.b_bytes(a.head_dim), 64), out_floats = h_blocks * bm * bn;
    char* memory = static_cast<char*>(
        scratch(kSoftmax, num * (q_bytes + 4 * (out_floats + 2 * bn)) + score_bytes));
    float* const scores = reinterpret_cast<float*>(memory);
    memory += score_bytes;
    std::vector<Block> blocks(num);
    for (int64_t i = 0; i < num; i++) {
      Block& block = blocks[i];
      block.head = x.head * a.group + i % a.group;
      block.query = from + i / a.group * bn;
      block.queries = std::min(bn, to - block.query);
      block.q = memory;
      block.sums = reinterpret_cast<float*>(memory + q_bytes);
      block.tops = block.sums + out_floats;
      block.totals = block.tops + bn;
      memory += q_bytes + 4 * (out_floats + 2 * bn);
      const int64_t place = d.q_offset + block.head * a.q_head + block.query * a.q_token;
      pack_b(p, {element(q, a.dtype, place), a.dtype, 1, a.q_token}, block.queries, a.head_dim, block.q);
      std::fill_n(block.tops, bn, kNothing);
      std::fill_n(block.totals, bn, 0.0f);
      std::fill_n(block.sums, out_floats, 0.0f);
    }

    const int64_t sweep = kStepsPerSweep * step;
    for (int64_t begin = d.begin_of(from) / step * step; begin < d.end_of(to); begin += sweep)
      for (const Block& block : blocks) {
        const int64_t end = std::min(begin + sweep, d.end_of(block.query + block.queries));
        for (int64_t key = begin; key < end; key += step)
          if (std::min(key + step, end) > d.begin_of(block.query))
            add_step(x, block, key, std::min(step, end - key), scores);
      }

    for (const Block& block : blocks) {
      float factors[64] = {};
      for (int64_t j = 0; j < block.queries; j++) {
        const float total = block.totals[j];
        factors[j] = total == 0 ? 0 : 1 / total;
        const int64_t place = d.stats_offset + block.head * a.stats_head + (block.query + j) * a.stats_token;
        for (int64_t c = 0; c < kStatsCopies; c++) {
          max[place + c] = block.tops[j];
          sum[place + c] = total;
        }
      }
      const int64_t place = d.q_offset + block.head * a.q_head + block.query * a.q_token;
      write_transposed(block.sums, bn, a.head_dim, block.queries, factors,
                       const_cast<char*>(element(out, a.dtype, place)), a.dtype, a.q_token);
    }
  }

  // Probabilities of keys i and i + 1 for kLanes queries from `column` on: in place, or to the layout in pairs.
  template <int parts>
  void put(float* scores, [[maybe_unused]] char* weights, int64_t i, int64_t column, vf even, vf odd) const {
    if constexpr (kInPairs<parts>) {
      store_right<parts>(weights, i, column, even, odd);
    } else {
      store(scores + i * bn + column, even);
      store(scores + (i + 1) * bn + column, odd);  // there is such a row: blocks of keys are even
    }
  }

  // Scores [keys][bn] to probabilities, down the columns; what was summed before shrinks where a maximum rises.
  template <int parts>
  void softmax(int64_t keys, float* scores, char* weights, float* tops, float* totals, float* sums_of_v) const {
    const float scale = a.scale, scale_of_2 = a.scale * kLog2E;
    const int64_t width = bn, head_dim = a.head_dim;
    for (int64_t c = 0; c < width; c += kLanes) {
      float* column = scores + c;
      vf m0 = splat(-INFINITY), m1 = m0, m2 = m0, m3 = m0;
      int64_t i = 0;
      for (; i + 4 <= keys; i += 4) {
        m0 = vmax(m0, load(column + i * width));
        m1 = vmax(m1, load(column + (i + 1) * width));
        m2 = vmax(m2, load(column + (i + 2) * width));
        m3 = vmax(m3, load(column + (i + 3) * width));
      }
      for (; i < keys; i++) m0 = vmax(m0, load(column + i * width));
      const vf old = load(tops + c), top = vmax(vmax(vmax(m0, m1), vmax(m2, m3)) * scale, old);
      const vf top_of_2 = top * kLog2E;
      const vf shrink = exp2_of_nonpositive<false>(old * kLog2E - top_of_2);
      store(tops + c, top);
      bool risen = false;
      for (int lane = 0; lane < kLanes; lane++) risen |= top[lane] != old[lane];
      auto weight = [&](int64_t row) {
        return exp2_of_nonpositive<parts == 1>(load(column + row * width) * scale_of_2 - top_of_2);
      };
      vf even_total = load(totals + c) * shrink, odd_total{};
      for (i = 0; i + 2 <= keys; i += 2) {
        const vf even = weight(i), odd = weight(i + 1);
        put<parts>(scores, weights, i, c, even, odd);
        even_total += even;
        odd_total += odd;
      }
      if (i < keys) {
        const vf even = weight(i);
        put<parts>(scores, weights, i, c, even, vf{});
        even_total += even;
        i += 2;
      }
      for (; kInPairs<parts> && i < p.padded_k(keys); i += 2) put<parts>(scores, weights, i, c, vf{}, vf{});
      store(totals + c, even_total + odd_total);
      if (risen) {
        float* sums = sums_of_v + c;
        for (int64_t h = 0; h < head_dim; h++, sums += width) store(sums, load(sums) * shrink);
      }
    }
  }

  // One step of keys for one block of queries.
  void add_step(const PackedHead& x, const Block& block, int64_t key, int64_t keys, float* scores) const {
    const Document& d = *x.document;
    const int64_t s = key / step, rows = round_up(keys, bm);
    for (int64_t i = 0; i < rows / bm; i++)
      product(p, x.k + s * k_step_bytes + i * p.a_bytes(a.head_dim), block.q, a.head_dim, scores + i * bm * bn, bn,
              false);
    if (d.mask != nullptr || !d.all_seen(block.query, block.query + block.queries, key, key + rows))
      hide(d, block.head, block.query, bn, key, rows, scores, 1, bn);
    char* weights = reinterpret_cast<char*>(scores + step * bn);
    auto run = p.bf16 ? &Forward::softmax<1> : &Forward::softmax<3>;
    (this->*run)(keys, scores, weights, block.tops, block.totals, block.sums);
    const void* right = weights;
    if (!(p.bf16 ? kInPairs<1> : kInPairs<3>)) {
      if (p.bf16) {
        pack_b(p, {scores, DType::f32, bn, 1}, bn, keys, weights);
      } else {
        right = scores;  // float32's layout is that of the scores
      }
    }
    for (int64_t h = 0; h < h_blocks; h++)
      product(p, x.v + s * v_step_bytes + h * p.a_bytes(step), right, keys, block.sums + h * bm * bn, bn, true);
  }

  void run() const {
    std::vector<PackedHead> heads;
    for (const Document& d : a.documents)
      for (int64_t m = 0; m < a.num_kv_heads && d.num_queries > 0; m++) heads.push_back({&d, m, nullptr, nullptr});
    // Long documents first: their tasks are the longest.
    std::stable_sort(heads.begin(), heads.end(), [](const PackedHead& x, const PackedHead& y) {
      return x.document->num_keys > y.document->num_keys;
    });
    for (size_t first = 0; first < heads.size();) {
      int64_t total = 0;
      size_t end = first;
      for (; end < heads.size() && (end == first || total + bytes(*heads[end].document) <= kPackedBytes); end++)
        total += bytes(*heads[end].document);
      char* memory = static_cast<char*>(scratch(kAttention, total));
      struct Task {
        const PackedHead* head;
        int64_t index;
      };
      std::vector<Task> packs, queries;
      for (size_t i = first; i < end; i++) {
        PackedHead& x = heads[i];
        const Document& d = *x.document;
        x.k = memory;
        x.v = memory + num_steps(d) * k_step_bytes;
        memory += bytes(d);
        for (int64_t s = 0; s < num_steps(d); s++) packs.push_back({&x, s});
        // From the last queries on, which see the most keys where attention is causal.
        const int64_t block = queries_per_task(d);
        for (int64_t from = (d.num_queries - 1) / block * block; from >= 0; from -= block)
          queries.push_back({&x, from});
      }
      parallel_blocks(packs.size(), 4, [&](int64_t begin, int64_t stop) {
        for (int64_t i = begin; i < stop; i++) pack(*packs[i].head, packs[i].index);
      });
      parallel_for(queries.size(), [&](int64_t i) {
        const Task& task = queries[i];
        const Document& d = *task.head->document;
        attend(*task.head, task.index, std::min(task.index + queries_per_task(d), d.num_queries));
      });
      first = end;
    }
  }
};

}  // namespace

// query, key, value, real_shift, drop_mask, padding_mask, attn_mask, prefix, actual_seq_qlen, actual_seq_kvlen, scalars
// -> softmax_max, softmax_sum, softmax_out (not used), attention_out
static void score(const Call& call) {
  const Attention a = read_attention(call, {3, 4, 5, 6, 7, 8, 9, 10});
  Forward{a, call[0].data, call[1].data, call[2].data, call[21].data, call[18].as<float>(), call[19].as<float>()}.run();
}

// float16, which mindformers hands to attention, is widened and rounded back.
PANGU_PRIMITIVE(FlashAttentionScore) {
  if (call[0].dtype == DType::f16) {
    in_float32(call, score);
  } else {
    score(call);
  }
}

}  // namespace pangu
