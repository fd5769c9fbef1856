// The output projection fused with its loss: hidden states and lm_head weight -> loss, metrics and both gradients, for
// a chunk of positions at a time. Of a chunk's logits only exp(logit - maximum of its group of tokens) is kept, in
// bfloat16 where products are: that keeps every probability to 2^-9 of itself, however small, as a rounded logit would
// not.
//
// S positions, D hidden, V vocabulary, C positions of a chunk, k teacher's tokens.
#include "head_loss.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "gemm.h"
#include "loss.h"
#include "plugin.h"
#include "vec.h"

namespace pangu {

namespace {

// Tokens whose logits share a maximum: about what a thread's second-level cache holds of the packed weight.
constexpr int64_t kGroup = 256;
constexpr int64_t kDepth = 512;                        // of D between additions to a group's logits
constexpr int64_t kChunkBytes = int64_t(212) << 20;    // what a chunk of positions may take

// A logit of a chunk that is needed by itself: slot < k of the k tokens, or the label at slot k.
struct Entry {
  int32_t token, position, slot;
};

template <typename E>
inline E from_float(float x);
template <>
inline float from_float<float>(float x) { return x; }
template <>
inline bf16 from_float<bf16>(float x) { return to_bf16(x); }

inline void put_row(float* to, const float* from, int64_t n) { std::memcpy(to, from, n * sizeof(float)); }
inline void put_row(float* to, const bf16* from, int64_t n) {
  for (int64_t i = 0; i < n; i++) to[i] = to_float(from[i]);
}
inline void put_row(bf16* to, const bf16* from, int64_t n) { std::memcpy(to, from, n * sizeof(bf16)); }
inline void put_row(bf16* to, const float* from, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
  for (; i < n; i++) to[i] = to_bf16(from[i]);
}

// One chunk of positions at work. E is the operands' element: bf16, or float.
template <typename E>
class Chunk {
 public:
  Chunk(const Head& head, int64_t capacity)
      : head_(head), D_(head.hidden.dim(1)), V_(head.weight.dim(0)),
        p_(packing(sizeof(E) == 2)), group_((kGroup + p_.block_m - 1) / p_.block_m * p_.block_m),
        num_groups_((V_ + group_ - 1) / group_), capacity_((capacity + p_.block_n - 1) / p_.block_n * p_.block_n),
        num_slots_(head.k + 1), has_gradients_(head.d_weight.exists()),
        exponentiate_(has_gradients_ ? head.with_entropy ? &Chunk::exponentiate<true, true>
                                                         : &Chunk::exponentiate<true, false>
                      : head.with_entropy ? &Chunk::exponentiate<false, true>
                                          : &Chunk::exponentiate<false, false>) {
    const uintptr_t bytes = lay_out(0);
    lay_out(reinterpret_cast<uintptr_t>(scratch(kChunk, bytes)));
  }

  // Bytes that a position of the chunk needs, about.
  static int64_t bytes_per_position(const Head& head) {
    const int64_t D = head.hidden.dim(1), V = head.weight.dim(0), groups = V / kGroup + 1;
    const bool gradients = head.d_weight.exists();
    return int64_t(sizeof(E)) * (2 * D + (gradients ? V : 0)) + 4 * (gradients ? D : 0) +
           (head.with_entropy ? 12 : 8) * groups + 16 * (head.k + 1);
  }

  // Finishes the given positions; adds their gradients to d_weight (or writes that, if `first`) and d_hidden.
  void run(const int64_t* positions, int64_t count, bool first) {
    positions_ = positions;
    C_ = count;
    width_ = (C_ + kLanes - 1) / kLanes * kLanes;
    list_entries();
    gather_hidden();
    parallel_for(num_groups_, [&](int64_t group) { compute_logits(group); });
    finish_positions();
    if (!has_gradients_) return;
    parallel_for(num_groups_, [&](int64_t group) { finish_gradient(group); });
    multiply_gradients(first);
    scatter_d_hidden();
  }

 private:
  // Gives the arrays their places from `at` on; returns the end.
  uintptr_t lay_out(uintptr_t at) {
    auto place = [&](auto*& array, int64_t count) {
      array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(at);
      at += (count * sizeof(*array) + 63) / 64 * 64;
    };
    place(hidden_, capacity_ * D_);
    place(packed_hidden_, capacity_ / p_.block_n * p_.b_bytes(D_));
    place(max_, num_groups_ * capacity_);
    place(sum_, num_groups_ * capacity_);
    if (head_.with_entropy) place(weighted_, num_groups_ * capacity_);
    place(picked_, capacity_ * num_slots_);
    place(beaten_, capacity_);
    if (has_gradients_) {
      place(logits_, V_ * capacity_);
      place(d_hidden_, capacity_ * D_);
    }
    return at;
  }

  void list_entries() {
    group_starts_.assign(num_groups_ + 1, 0);
    entries_.resize(C_ * num_slots_);
    for (int pass = 0; pass < 2; pass++) {  // count, then place: within a group in the order of positions
      for (int64_t c = 0; c < C_; c++) {
        for (int slot = 0; slot < num_slots_; slot++) {
          const int64_t at = positions_[c];
          const int32_t token = slot < head_.k ? head_.ids[at * head_.k + slot] : head_.labels[at];
          int64_t& start = group_starts_[token / group_ + (pass == 0)];
          if (pass == 1) entries_[start] = {token, static_cast<int32_t>(c), slot};
          start++;
        }
      }
      if (pass == 0) {
        for (int64_t g = 0; g < num_groups_; g++) group_starts_[g + 1] += group_starts_[g];
      } else {
        for (int64_t g = num_groups_; g > 0; g--) group_starts_[g] = group_starts_[g - 1];
        group_starts_[0] = 0;
      }
    }
  }

  void gather_hidden() {
    const int64_t depth_bytes = p_.b_bytes(kDepth);
    parallel_for((C_ + p_.block_n - 1) / p_.block_n, [&](int64_t block) {
      const int64_t begin = block * p_.block_n, end = std::min<int64_t>(C_, begin + p_.block_n);
      for (int64_t c = begin; c < end; c++) {
        const int64_t from = positions_[c] * D_;
        if (head_.hidden.dtype == DType::bf16) {
          put_row(hidden_ + c * D_, head_.hidden.as<bf16>() + from, D_);
        } else {
          put_row(hidden_ + c * D_, head_.hidden.as<float>() + from, D_);
        }
      }
      char* packed = packed_hidden_ + block * p_.b_bytes(D_);
      for (int64_t k = 0; k < D_; k += kDepth, packed += depth_bytes)
        pack_b(p_, {hidden_ + begin * D_ + k, dtype(), 1, D_}, end - begin, std::min(kDepth, D_ - k), packed);
    });
  }

  // A group of tokens against all positions: one block of positions at a time, tokens down, positions across.
  void compute_logits(int64_t group) {
    const int64_t first = group * group_, tokens = std::min(group_, V_ - first);
    const int64_t blocks = (tokens + p_.block_m - 1) / p_.block_m, depth_bytes = p_.a_bytes(kDepth);
    char* weight = static_cast<char*>(scratch(kPackA, blocks * p_.a_bytes(D_)));
    for (int64_t k = 0; k < D_; k += kDepth) {
      const int64_t depth = std::min(kDepth, D_ - k);
      for (int64_t i = 0; i < blocks; i++) {
        const int64_t row = first + i * p_.block_m;
        const Operand rows{head_.weight.as<char>() + (row * D_ + k) * size_of(head_.weight.dtype), head_.weight.dtype,
                           D_, 1};
        pack_a(p_, rows, std::min<int64_t>(p_.block_m, V_ - row), depth,
               weight + k / kDepth * blocks * depth_bytes + i * p_.a_bytes(depth));
      }
    }
    const int64_t width = p_.block_n;
    float* tile = static_cast<float*>(scratch(kTile, group_ * width * 4));
    const Entry* entry = entries_.data() + group_starts_[group];
    const Entry* const last_entry = entries_.data() + group_starts_[group + 1];
    for (int64_t begin = 0; begin < C_; begin += width) {
      const char* hidden = packed_hidden_ + begin / width * p_.b_bytes(D_);
      for (int64_t k = 0; k < D_; k += kDepth) {
        const int64_t depth = std::min(kDepth, D_ - k);
        const char* slab = weight + k / kDepth * blocks * depth_bytes;
        for (int64_t i = 0; i < blocks; i++)
          product(p_, slab + i * p_.a_bytes(depth), hidden + k / kDepth * p_.b_bytes(kDepth), depth,
                  tile + i * p_.block_m * width, width, k > 0);
      }
      const Entry* const end = std::find_if(entry, last_entry,
                                            [&](const Entry& e) { return e.position >= begin + width; });
      pick(tile, entry, end, first, tokens, begin);
      entry = end;
      for (int64_t lane = 0; lane < width && begin + lane < width_; lane += kLanes)
        (this->*exponentiate_)(tile + lane, tokens, group * width_ + begin + lane, first * width_ + begin + lane);
    }
  }

  // Takes the entries' logits out of a tile, so that what is left of it are the tokens outside the k.
  void pick(float* tile, const Entry* begin, const Entry* end, int64_t first, int64_t tokens, int64_t first_position) {
    const int64_t width = p_.block_n;
    for (const Entry* e = begin; e < end; e++) {
      const float* column = tile + e->position - first_position;
      const float logit = column[(e->token - first) * width];
      picked_[e->position * num_slots_ + e->slot] = logit;
      if (e->slot == 0 && head_.with_top) {  // the first of equals is the largest
        bool beaten = false;
        for (int64_t t = 0; t < tokens; t++)
          beaten |= first + t < e->token ? column[t * width] >= logit : column[t * width] > logit;
        beaten_[e->position] = beaten;
      }
    }
    for (const Entry* e = begin; e < end; e++)
      if (e->slot < head_.k) tile[(e->token - first) * width + e->position - first_position] = -INFINITY;
  }

  // kLanes columns of a tile: their maximum and sum of exponentials, which are stored where gradients are wanted; for
  // the entropy, the sum of exp(x) x too, where x is the logit less the maximum.
  template <bool kGradients, bool kEntropy>
  void exponentiate(const float* tile, int64_t tokens, int64_t at, int64_t logits_at) {
    const int64_t width = p_.block_n;
    vf max = splat(-3e38f), sum = vf{}, weighted = vf{};  // max is finite: -inf minus it is -inf
    for (int64_t t = 0; t < tokens; t++) max = vmax(load(tile + t * width), max);
    for (int64_t t = 0; t < tokens; t++) {
      vf x = load(tile + t * width) - max, e = vexp(x);
      sum += e;
      if constexpr (kEntropy) weighted += e * x;
      if constexpr (kGradients) store(logits_ + logits_at + t * width_, e);
    }
    store(max_ + at, max);
    store(sum_ + at, sum);
    if constexpr (kEntropy) store(weighted_ + at, weighted);
  }

  // picked_ becomes the entries' gradients and max_ what the group's exponentials are multiplied by.
  void finish_positions() {
    parallel_for(width_ / kLanes, [&](int64_t block) {
      const int64_t begin = block * kLanes;
      vf top = splat(-3e38f);
      for (int64_t g = 0; g < num_groups_; g++) top = vmax(load(max_ + g * width_ + begin), top);
      double total[kLanes] = {}, weighted[kLanes] = {};
      for (int64_t g = 0; g < num_groups_; g++) {
        const int64_t at = g * width_ + begin;
        const vf shift = load(max_ + at) - top, factor = vexp(shift);
        float part[kLanes];
        store(part, load(sum_ + at) * factor);
        for (int i = 0; i < kLanes; i++) total[i] += part[i];
        if (!head_.with_entropy) continue;
        store(part, (load(weighted_ + at) + load(sum_ + at) * shift) * factor);
        for (int i = 0; i < kLanes; i++) weighted[i] += part[i];
      }
      float scale[kLanes] = {};
      for (int i = 0; i < kLanes && begin + i < C_; i++) {
        const int64_t c = begin + i;
        LogitSums sums{};
        sums.rest_lse = total[i] > 0 ? top[i] + std::log(total[i]) : total[i] == 0 ? -INFINITY : NAN;
        if (head_.with_entropy) sums.entropy = std::log(total[i]) - weighted[i] / total[i];
        if (head_.with_top) sums.is_top = is_largest(c);
        const double rest_grad = head_.finish(positions_[c], sums, picked_ + c * num_slots_);
        if (total[i] != 0) scale[i] = static_cast<float>(rest_grad / total[i]);
      }
      if (!has_gradients_) return;
      const vf factor = load(scale);
      for (int64_t g = 0; g < num_groups_; g++) {
        float* max = max_ + g * width_ + begin;
        store(max, vexp(load(max) - top) * factor);
      }
    });
  }

  // Whether the first picked token (of the k; of none, the label) has the largest logit; the first of equals counts.
  bool is_largest(int64_t c) const {
    const float* picked = picked_ + c * num_slots_;
    const int32_t* ids = head_.k > 0 ? head_.ids + positions_[c] * head_.k : head_.labels + positions_[c];
    if (beaten_[c]) return false;
    for (int i = 1; i < head_.k; i++)
      if (ids[i] < ids[0] ? picked[i] >= picked[0] : picked[i] > picked[0]) return false;
    const int64_t own = ids[0] / group_;
    for (int64_t g = 0; g < num_groups_; g++) {
      const float max = max_[g * width_ + c];
      if (g < own ? max >= picked[0] : g > own && max > picked[0]) return false;
    }
    return true;
  }

  void finish_gradient(int64_t group) {
    const int64_t first = group * group_, tokens = std::min(group_, V_ - first);
    const float* scale = max_ + group * width_;
    for (int64_t t = first; t < first + tokens; t++) {
      E* row = logits_ + t * width_;
      for (int64_t c = 0; c < width_; c += kLanes) store(row + c, load(row + c) * load(scale + c));
    }
    // The label comes last among a position's slots of a token: its gradient holds the whole.
    for (int64_t i = group_starts_[group]; i < group_starts_[group + 1]; i++) {
      const Entry& e = entries_[i];
      logits_[e.token * width_ + e.position] = from_float<E>(picked_[e.position * num_slots_ + e.slot]);
    }
  }

  void multiply_gradients(bool first) {
    Gemm g;
    g.M = V_;
    g.N = D_;
    g.K = C_;
    g.a = {logits_, dtype(), width_, 1};
    g.b = {hidden_, dtype(), D_, 1};
    g.c = head_.d_weight.data;
    g.c_dtype = DType::f32;
    g.c_stride = D_;
    g.accumulate = !first;
    g.streams = true;
    g.bf16_products = p_.bf16;
    gemm(g);
    g.M = C_;
    g.K = V_;
    g.a = {logits_, dtype(), 1, width_};
    g.b = {head_.weight.data, head_.weight.dtype, D_, 1};
    g.c = d_hidden_;
    g.accumulate = g.streams = false;
    gemm(g);
  }

  void scatter_d_hidden() {
    for (int64_t c = 0; c < C_; c++) {
      const int64_t to = positions_[c] * D_;
      if (head_.d_hidden.dtype == DType::bf16) {
        put_row(head_.d_hidden.as<bf16>() + to, d_hidden_ + c * D_, D_);
      } else {
        put_row(head_.d_hidden.as<float>() + to, d_hidden_ + c * D_, D_);
      }
    }
  }

  static DType dtype() { return sizeof(E) == 2 ? DType::bf16 : DType::f32; }

  const Head& head_;
  const int64_t D_, V_;
  const Packing p_;
  const int64_t group_, num_groups_, capacity_;
  const int num_slots_;
  const bool has_gradients_;
  void (Chunk::*const exponentiate_)(const float*, int64_t, int64_t, int64_t);
  const int64_t* positions_ = nullptr;
  int64_t C_ = 0, width_ = 0;  // positions, and the same up to whole vectors
  // In memory that the thread keeps: touching new pages took a tenth of a small model's step.
  E *hidden_, *logits_;  // [C, D]; [V, width]: exponentials, then gradients
  char* packed_hidden_;
  float *max_, *sum_, *weighted_;  // [groups, width]
  float* picked_;       // [C, k + 1]
  float* d_hidden_;     // [C, D]
  uint8_t* beaten_;     // [C]: a token of the same group is larger than the first picked one
  std::vector<Entry> entries_;
  std::vector<int64_t> group_starts_;
};

void fill_zero(const Tensor& x) {
  char* data = x.as<char>();
  parallel_blocks(x.size() * size_of(x.dtype), 1 << 20,
                  [&](int64_t begin, int64_t end) { std::memset(data + begin, 0, end - begin); });
}

template <typename E>
void run_in_chunks(const Head& head) {
  const int64_t count = static_cast<int64_t>(head.positions.size());
  if (head.d_hidden.exists() && count < head.hidden.dim(0)) fill_zero(head.d_hidden);
  if (count == 0) {
    if (head.d_weight.exists()) fill_zero(head.d_weight);
    return;
  }
  const int64_t most = std::max<int64_t>(1, kChunkBytes / Chunk<E>::bytes_per_position(head));
  const int64_t num_chunks = (count + most - 1) / most;
  Chunk<E> chunk(head, (count + num_chunks - 1) / num_chunks);
  for (int64_t i = 0; i < num_chunks; i++) {
    const int64_t begin = i * count / num_chunks;
    chunk.run(head.positions.data() + begin, (i + 1) * count / num_chunks - begin, i == 0);
  }
}

}  // namespace

void run_head(const Head& head) {
  const bool rounds = bf16_products() || head.hidden.dtype == DType::bf16 || head.weight.dtype == DType::bf16;
  if (rounds) {
    run_in_chunks<bf16>(head);
  } else {
    run_in_chunks<float>(head);
  }
}

Head head_of(const Call& call) {
  Head head;
  head.hidden = call[0];
  head.weight = call[1];
  head.labels = call[2].as<int32_t>();
  expect_float(call, 0, "hidden");
  expect_float(call, 1, "weight");
  expect(head.hidden.rank == 2, call, "hidden", shape_of(head.hidden), "[positions, hidden]");
  expect(head.weight.rank == 2 && head.weight.dim(1) == head.hidden.dim(1), call, "weight", shape_of(head.weight),
         "[vocabulary, " + std::to_string(head.hidden.dim(1)) + "]");
  expect_size(call, 2, "labels", head.hidden.dim(0), DType::i32);
  expect_ids(call, 2, "labels", head.weight.dim(0));
  return head;
}

namespace {

struct Sums {
  double weight = 0, ce = 0, kl = 0, teacher_mass = 0, agreement = 0;
};

// Cross-entropy and KL to a teacher, of the positions whose weight (tensor 3) is not zero.
Sums run_losses(const Call& call, Head& head, const LossForm& form, const float* teacher_logprobs, double ce_factor,
                double kl_factor) {
  const int64_t S = head.hidden.dim(0), k = head.k;
  expect_size(call, 3, "weights", S, DType::f32);
  const float* weights = call[3].as<float>();
  for (int64_t s = 0; s < S; s++)
    if (weights[s] != 0) head.positions.push_back(s);
  std::vector<PositionLoss> losses(S);
  std::vector<uint8_t> agrees(S);
  head.with_top = k > 0;
  head.finish = [&](int64_t s, const LogitSums& sums, float* picked) {
    const double weight = weights[s];
    Position position{head.k, teacher_logprobs + s * k, picked, picked[k], -1, sums.rest_lse, k < head.weight.dim(0),
                      weight * ce_factor, weight * kl_factor};
    for (int i = 0; i < k; i++)
      if (head.ids[s * k + i] == head.labels[s]) position.label_slot = i;
    // In place: position_loss reads a logit for the last time when it writes that gradient.
    losses[s] = position_loss(form, position, picked);
    picked[k] = static_cast<float>(losses[s].label_grad);
    agrees[s] = sums.is_top;
    return losses[s].rest_grad;
  };
  run_head(head);
  Sums sums;
  for (int64_t s : head.positions) {
    const double weight = weights[s];
    sums.weight += weight;
    sums.ce += weight * losses[s].ce;
    sums.kl += weight * losses[s].kl;
    sums.teacher_mass += weight * losses[s].teacher_mass;
    sums.agreement += weight * agrees[s];
  }
  return sums;
}

// hidden [S, D], weight [V, D], labels [S], weights [S] -> loss [1], metrics [1][, d_hidden [S, D], d_weight [V, D]]
void cross_entropy_head(const Call& call, bool gradients) {
  Head head = head_of(call);
  if (gradients) {
    head.d_hidden = call[6];
    head.d_weight = call[7];
  }
  const Sums sums = run_losses(call, head, {}, nullptr, 1, 0);
  *call[4].as<float>() = static_cast<float>(sums.ce);
  *call[5].as<float>() = static_cast<float>(sums.weight);
}

// hidden, weight, labels, weights, teacher_ids [S, k], teacher_logprobs [S, k], form [4] = temperature, tail, factors
// of cross-entropy and KL -> loss [1], metrics [5][, d_hidden, d_weight]
void topk_kl_head(const Call& call, bool gradients) {
  Head head = head_of(call);
  const Tensor ids = call[4];
  const int64_t S = head.hidden.dim(0), V = head.weight.dim(0);
  expect(ids.rank == 2 && ids.dim(1) > 0 && ids.dim(1) <= V, call, "teacher_ids", shape_of(ids),
         "[positions, 1 to " + std::to_string(V) + "]");
  head.k = static_cast<int>(ids.dim(1));
  expect_size(call, 4, "teacher_ids", S * head.k, DType::i32);
  expect_ids(call, 4, "teacher_ids", V);
  expect_size(call, 5, "teacher_logprobs", S * head.k, DType::f32);
  expect_size(call, 6, "form", 4, DType::f32);
  head.ids = ids.as<int32_t>();
  if (gradients) {
    head.d_hidden = call[9];
    head.d_weight = call[10];
  }
  const double ce_factor = call[6].as<float>()[2], kl_factor = call[6].as<float>()[3];
  const Sums sums = run_losses(call, head, loss_form(call, 6), call[5].as<float>(), ce_factor, kl_factor);
  double loss = 0;
  if (ce_factor != 0) loss += ce_factor * sums.ce;
  if (kl_factor != 0) loss += kl_factor * sums.kl;
  *call[7].as<float>() = static_cast<float>(loss);
  float* metrics = call[8].as<float>();
  for (double sum : {sums.weight, sums.ce, sums.kl, sums.teacher_mass, sums.agreement})
    *metrics++ = static_cast<float>(sum);
}

}  // namespace

// "Value": without the gradients. Names of their own: MindSpore keeps the inferred outputs of a function by its name.
PANGU_FUNCTION(CrossEntropyHead) { cross_entropy_head(call, true); }
PANGU_FUNCTION(CrossEntropyHeadValue) { cross_entropy_head(call, false); }
PANGU_FUNCTION(TopkKlHead) { topk_kl_head(call, true); }
PANGU_FUNCTION(TopkKlHeadValue) { topk_kl_head(call, false); }

}  // namespace pangu
