// Losses on a chunk of logits: CrossEntropy and TopkKl of ops.Custom.
#include "loss.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "plugin.h"
#include "vec.h"

namespace pangu {

LossForm loss_form(const Call& call, int tensor) {
  expect_dtype(call, tensor, "form", DType::f32);
  const float* form = call[tensor].as<float>();
  expect(form[0] > 0, call, "temperature", std::to_string(form[0]), "a positive number");
  return {form[0], static_cast<Tail>(static_cast<int>(form[1]))};
}

void expect_size(const Call& call, int tensor, const char* argument, int64_t size, DType dtype) {
  expect_dtype(call, tensor, argument, dtype);
  expect(call[tensor].size() == size, call, argument, shape_of(call[tensor]), std::to_string(size) + " elements");
}

void expect_ids(const Call& call, int tensor, const char* argument, int64_t vocab_size) {
  expect_dtype(call, tensor, argument, DType::i32);
  const int32_t* ids = call[tensor].as<int32_t>();
  for (int64_t i = 0; i < call[tensor].size(); i++)
    if (ids[i] < 0 || ids[i] >= vocab_size)
      expect(false, call, argument, std::to_string(ids[i]), "a token from 0 to " + std::to_string(vocab_size - 1));
}

namespace {

double log_sum_exp(const double* x, int n) {
  double top = -INFINITY, sum = 0;
  for (int i = 0; i < n; i++) top = std::max(top, x[i]);
  if (std::isinf(top)) return top;
  for (int i = 0; i < n; i++) sum += std::exp(x[i] - top);
  return top + std::log(sum);
}

}  // namespace

PositionLoss position_loss(const LossForm& form, const Position& at, float* top_grads) {
  const int k = at.k, n = k + at.has_tail;
  double* p = static_cast<double*>(scratch(kSoftmax, 3 * (k + 1) * sizeof(double)));
  double *q = p + k + 1, *grad = q + k + 1;
  for (int i = 0; i < k; i++) q[i] = at.top_logits[i];
  q[k] = at.rest_lse;
  const double lse = log_sum_exp(q, k + 1);
  PositionLoss loss{lse - at.label_logit, 0, 0, 0, 0};
  double sum_of_grads = 0;
  if (k > 0) {
    for (int i = 0; i < k; i++) {
      p[i] = at.teacher_logprobs[i];
      loss.teacher_mass += std::exp(p[i]);
    }
    loss.teacher_mass = std::min(1.0, loss.teacher_mass);
    p[k] = std::log(std::max(1 - loss.teacher_mass, 1e-37));
    for (int i = 0; i < n; i++) q[i] -= lse;
    const double t = form.temperature;
    if (t != 1) {
      for (double* x : {p, q}) {
        for (int i = 0; i < n; i++) x[i] /= t;
        const double normaliser = log_sum_exp(x, n);
        for (int i = 0; i < n; i++) x[i] -= normaliser;
      }
    }
    // Of the outcomes that the tail's treatment keeps, normalised over themselves where it says so.
    const int kept = form.tail == Tail::bucket ? n : k;
    const bool both = form.tail == Tail::renormalised_both;
    const double p_lse = both || form.tail == Tail::renormalised_teacher ? log_sum_exp(p, k) : 0;
    const double q_lse = both ? log_sum_exp(q, k) : 0;
    double sum = 0, sum_kept = 0;
    for (int i = 0; i < kept; i++) {
      const double log_p = p[i] - p_lse, probability = std::exp(log_p);
      if (probability > 0) sum += probability * (log_p - (q[i] - q_lse));  // 0 log 0 is 0
      grad[i] = -t * t * probability;
      sum_kept += grad[i];
    }
    loss.kl = t * t * sum;
    for (int i = kept; i < n; i++) grad[i] = 0;
    if (both)
      for (int i = 0; i < k; i++) grad[i] -= std::exp(q[i] - q_lse) * sum_kept;
    if (t != 1) {
      double total = 0;
      for (int i = 0; i < n; i++) total += grad[i];
      for (int i = 0; i < n; i++) grad[i] = (grad[i] - std::exp(q[i]) * total) / t;
    }
    for (int i = 0; i < n; i++) sum_of_grads += grad[i] *= at.kl_weight;
  }
  // A top-k log-probability moves with its logit and -lse, the tail's with every other logit and -lse.
  const double through_lse = at.ce_weight - sum_of_grads;
  loss.rest_grad = std::exp(at.rest_lse - lse) * through_lse + (k > 0 && at.has_tail ? grad[k] : 0);
  for (int i = 0; i < k; i++)
    top_grads[i] = static_cast<float>(std::exp(at.top_logits[i] - lse) * through_lse + grad[i]);
  if (at.label_slot >= 0) {
    loss.label_grad = std::exp(at.label_logit - lse) * through_lse + grad[at.label_slot];
  } else {
    loss.label_grad = std::exp(at.label_logit - at.rest_lse) * loss.rest_grad;
  }
  loss.label_grad -= at.ce_weight;
  return loss;
}

namespace {

inline void put(float* to, double x) { *to = static_cast<float>(x); }
inline void put(bf16* to, double x) { *to = to_bf16(static_cast<float>(x)); }
inline float get(const float* from) { return *from; }
inline float get(const bf16* from) { return to_float(*from); }

constexpr int64_t kBlock = 1024;  // logits at a time, in the first-level cache

// One row's logits outside the (sorted) ids: their maximum and the sum of exp(logit - maximum), in one pass; and the
// first index of the largest of all.
struct RowSum {
  float max = -3e38f;  // finite, so that -inf minus it is -inf
  double sum = 0;
  int64_t argmax = 0;
};

template <typename T>
RowSum sum_row(const T* logits, int64_t V, const int32_t* ids, int k) {
  RowSum row;
  float best = -INFINITY;
  const int32_t* next = ids;
  alignas(64) float block[kBlock];
  for (int64_t begin = 0; begin < V; begin += kBlock) {
    const int64_t count = std::min(kBlock, V - begin);
    vf block_max = splat(-3e38f);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      vf x = load(logits + begin + i);
      store(block + i, x);
      block_max = vmax(x, block_max);
    }
    if (i < count) {
      for (int64_t j = i; j < i + kLanes; j++) block[j] = j < count ? get(logits + begin + j) : -INFINITY;
      block_max = vmax(load(block + i), block_max);
    }
    const float top = reduce_max(block_max);
    if (top > best) {
      best = top;
      for (int64_t j = count - 1; j >= 0; j--)
        if (block[j] == top) row.argmax = begin + j;
    }
    float max = top;
    if (next < ids + k && *next < begin + count) {
      for (; next < ids + k && *next < begin + count; next++) block[*next - begin] = -INFINITY;
      block_max = splat(-3e38f);
      for (int64_t j = 0; j < count; j += kLanes) block_max = vmax(load(block + j), block_max);
      max = reduce_max(block_max);
    }
    if (max > row.max) {
      row.sum *= std::exp(double(row.max) - max);
      row.max = max;
    }
    vf sum = vf{};
    for (int64_t j = 0; j < count; j += kLanes) sum += vexp(load(block + j) - row.max);
    row.sum += reduce_sum(sum);
  }
  return row;
}

// scale * exp(logit - max).
template <typename T>
void write_gradient(const T* logits, int64_t V, float max, float scale, T* dlogits) {
  int64_t i = 0;
  // The k largest are overwritten afterwards: clamped, they cannot become inf * 0.
  for (; i + kLanes <= V; i += kLanes) store(dlogits + i, vexp(vmin(load(logits + i) - max, vf{})) * scale);
  if (i < V) {
    const int rest = static_cast<int>(V - i);
    store_part(dlogits + i, vexp(vmin(load_part(logits + i, rest) - max, vf{})) * scale, rest);
  }
}

struct Rows {
  int64_t N, V;
  int k;
  const int32_t *labels, *ids;
  const float *teacher_logprobs, *ce_weights, *kl_weights;
  LossForm form;
  float *ce, *kl, *teacher_mass, *agreement;  // kl, teacher_mass, agreement: null where k = 0
};

template <typename T>
void loss_of_rows(const Rows& r, const T* logits_NV, T* dlogits_NV) {
  parallel_for(r.N, [&](int64_t n) {
    const T* logits = logits_NV + n * r.V;
    T* dlogits = dlogits_NV + n * r.V;
    const int32_t *ids = r.ids + n * r.k, label = r.labels[n];
    std::vector<int32_t> sorted(ids, ids + r.k);
    std::sort(sorted.begin(), sorted.end());
    std::vector<float> top_logits(r.k), top_grads(r.k);
    const RowSum row = sum_row(logits, r.V, sorted.data(), r.k);
    Position position{r.k, r.teacher_logprobs + n * r.k, top_logits.data(), get(logits + label), -1,
                      row.sum > 0 ? row.max + std::log(row.sum) : row.sum == 0 ? -INFINITY : NAN, r.k < r.V,
                      r.ce_weights[n], r.kl_weights ? r.kl_weights[n] : 0};
    for (int i = 0; i < r.k; i++) {
      top_logits[i] = get(logits + ids[i]);
      if (ids[i] == label) position.label_slot = i;
    }
    const PositionLoss loss = position_loss(r.form, position, top_grads.data());
    r.ce[n] = static_cast<float>(loss.ce);
    if (r.k > 0) {
      r.kl[n] = static_cast<float>(loss.kl);
      r.teacher_mass[n] = static_cast<float>(loss.teacher_mass);
      r.agreement[n] = row.argmax == ids[0];
    }
    if (position.ce_weight == 0 && position.kl_weight == 0) {
      std::fill(dlogits, dlogits + r.V, T{});
      return;
    }
    write_gradient(logits, r.V, row.max, row.sum == 0 ? 0 : static_cast<float>(loss.rest_grad / row.sum), dlogits);
    for (int i = 0; i < r.k; i++) put(dlogits + ids[i], top_grads[i]);
    put(dlogits + label, loss.label_grad);
  });
}

void run_rows(const Call& call, const Rows& rows, int gradient) {
  expect_float(call, 0, "logits");
  if (call[0].dtype == DType::bf16) {
    loss_of_rows(rows, call[0].as<bf16>(), call[gradient].as<bf16>());
  } else {
    loss_of_rows(rows, call[0].as<float>(), call[gradient].as<float>());
  }
}

// logits [N, V], labels [N], weights [N] -> ce [N], dlogits [N, V]
void cross_entropy(const Call& call) {
  const Tensor logits = call[0];
  expect(logits.rank == 2, call, "logits", shape_of(logits), "[positions, vocabulary]");
  Rows rows{logits.dim(0), logits.dim(1), 0, call[1].as<int32_t>(), nullptr, nullptr, call[2].as<float>(), nullptr,
            {}, call[3].as<float>(), nullptr, nullptr, nullptr};
  expect_size(call, 1, "labels", rows.N, DType::i32);
  expect_ids(call, 1, "labels", rows.V);
  expect_size(call, 2, "weights", rows.N, DType::f32);
  run_rows(call, rows, 4);
}

// logits [N, V], labels [N], teacher_ids [N, k], teacher_logprobs [N, k], ce_weights [N], kl_weights [N], form [2]
// -> ce [N], kl [N], teacher_mass [N], agreement [N], dlogits [N, V]
void topk_kl(const Call& call) {
  const Tensor logits = call[0], ids = call[2];
  expect(logits.rank == 2, call, "logits", shape_of(logits), "[positions, vocabulary]");
  expect(ids.rank == 2 && ids.dim(1) > 0, call, "teacher_ids", shape_of(ids), "[positions, k]");
  const int64_t N = logits.dim(0), V = logits.dim(1), k = ids.dim(1);
  expect(k <= V, call, "k", std::to_string(k), "at most the vocabulary, " + std::to_string(V));
  expect_size(call, 1, "labels", N, DType::i32);
  expect_size(call, 2, "teacher_ids", N * k, DType::i32);
  expect_ids(call, 1, "labels", V);
  expect_ids(call, 2, "teacher_ids", V);
  expect_size(call, 3, "teacher_logprobs", N * k, DType::f32);
  expect_size(call, 4, "ce_weights", N, DType::f32);
  expect_size(call, 5, "kl_weights", N, DType::f32);
  Rows rows{N, V, static_cast<int>(k), call[1].as<int32_t>(), ids.as<int32_t>(), call[3].as<float>(),
            call[4].as<float>(), call[5].as<float>(), loss_form(call, 6), call[7].as<float>(), call[8].as<float>(),
            call[9].as<float>(), call[10].as<float>()};
  run_rows(call, rows, 11);
}

}  // namespace

PANGU_FUNCTION(CrossEntropy) { cross_entropy(call); }
PANGU_FUNCTION(TopkKl) { topk_kl(call); }

}  // namespace pangu
