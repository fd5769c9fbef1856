// The output projection fused with what is made of its logits, a chunk of positions at a time: see head_loss.cc.
//
// S positions, D hidden, V vocabulary, k tokens that are looked at beside the label.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "common.h"

namespace pangu {

// What the logits of a position leave, besides the picked ones.
struct LogitSums {
  double rest_lse;  // log-sum-exp of the logits outside the k; -inf where there are none
  double entropy;   // of the softmax, in nats; with_entropy
  bool is_top;      // the first picked token has the largest logit, or the first of equals; with_top
};

struct Head {
  Tensor hidden, weight;           // [S, D], [V, D]
  const int32_t* labels;           // [S]
  std::vector<int64_t> positions;  // those that count; the others leave before any product
  int k = 0;
  const int32_t* ids = nullptr;  // [S, k], distinct in a row
  bool with_top = false;
  bool with_entropy = false;      // k = 0 only
  Tensor d_hidden{}, d_weight{};  // absent: no gradients
  // Called once for each position s, on any thread. picked [k + 1]: the logits of the k tokens, then the label's; with
  // gradients it replaces them by theirs (the label's holds the whole, also where it is one of the k) and returns r, where
  // the gradient of any other token is r * exp(logit - rest_lse).
  std::function<double(int64_t s, const LogitSums& sums, float* picked)> finish;
};

// From tensors 0 to 2 of a call: hidden, weight, labels. Raises Error where they do not fit together.
Head head_of(const Call& call);

// Takes every position to `finish`, and writes the gradients.
void run_head(const Head& head);

}  // namespace pangu
