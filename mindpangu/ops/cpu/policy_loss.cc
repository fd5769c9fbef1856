// The output projection fused with the policy-gradient loss, and with the log-probabilities of its labels; see
// ops/policy_loss.py for the definitions.
//
// S positions, D hidden, V vocabulary.
#include <algorithm>
#include <cmath>
#include <vector>

#include "head_loss.h"
#include "loss.h"
#include "plugin.h"

namespace pangu {

namespace {

constexpr double kLogRatioLimit = 20;

struct PolicyForm {
  double clip_low, clip_high, kl_factor;
};

// Of one position, each per unit of its weight.
struct PolicyLoss {
  double surrogate, kl, is_clipped;
  double logprob_grad;  // of surrogate + kl_factor * kl
  double entropy;
};

PolicyLoss policy_loss(const PolicyForm& form, double logprob, double advantage, double old_logprob,
                       double ref_logprob) {
  const double d = logprob - old_logprob, ratio = std::exp(std::clamp(d, -kLogRatioLimit, kLogRatioLimit));
  const double e = ref_logprob - logprob, to_ref = std::clamp(e, -kLogRatioLimit, kLogRatioLimit);
  const bool is_clipped = (advantage > 0 && ratio > form.clip_high) || (advantage < 0 && ratio < form.clip_low);
  PolicyLoss loss{};
  loss.is_clipped = is_clipped;
  loss.surrogate = -advantage * (is_clipped ? std::clamp(ratio, form.clip_low, form.clip_high) : ratio);
  loss.kl = std::expm1(to_ref) - to_ref;
  if (!is_clipped && std::abs(d) < kLogRatioLimit) loss.logprob_grad = -advantage * ratio;
  if (std::abs(e) < kLogRatioLimit) loss.logprob_grad -= form.kl_factor * std::expm1(to_ref);
  return loss;
}

// hidden [S, D], weight [V, D], labels, weights, denominators, advantages, old_logprobs, ref_logprobs [S], form [3] =
// clip_low, clip_high, kl_factor -> loss [1], metrics [5][, d_hidden [S, D], d_weight [V, D]]
void policy_head(const Call& call, bool gradients) {
  Head head = head_of(call);
  const int64_t S = head.hidden.dim(0);
  const char* const names[] = {"weights", "denominators", "advantages", "old_logprobs", "ref_logprobs"};
  const float* inputs[5];
  for (int i = 0; i < 5; i++) {
    expect_size(call, 3 + i, names[i], S, DType::f32);
    inputs[i] = call[3 + i].as<float>();
  }
  const auto [weights, denominators, advantages, old_logprobs, ref_logprobs] = inputs;
  expect_size(call, 8, "form", 3, DType::f32);
  const float* numbers = call[8].as<float>();
  const PolicyForm form{numbers[0], numbers[1], numbers[2]};
  for (int64_t s = 0; s < S; s++)
    if (weights[s] != 0 || denominators[s] != 0) head.positions.push_back(s);
  if (gradients) {
    head.d_hidden = call[11];
    head.d_weight = call[12];
  }
  head.with_entropy = true;
  std::vector<PolicyLoss> losses(S);
  head.finish = [&](int64_t s, const LogitSums& sums, float* picked) {
    const double logprob = *picked - sums.rest_lse;
    losses[s] = policy_loss(form, logprob, advantages[s], old_logprobs[s], ref_logprobs[s]);
    losses[s].entropy = sums.entropy;
    // d logprob / d logits = onehot - softmax
    const double grad = weights[s] == 0 ? 0 : weights[s] * losses[s].logprob_grad;
    *picked = static_cast<float>(grad * -std::expm1(logprob));
    return -grad;
  };
  run_head(head);
  double loss = 0, sums[5] = {};
  for (int64_t s : head.positions) {
    const PolicyLoss& at = losses[s];
    const double n = denominators[s];
    if (weights[s] != 0) loss += weights[s] * (at.surrogate + form.kl_factor * at.kl);
    const double terms[] = {n, weights[s] * at.surrogate, n * at.kl, n * at.is_clipped, n * at.entropy};
    for (int i = 0; i < 5; i++) sums[i] += terms[i];
  }
  *call[9].as<float>() = static_cast<float>(loss);
  for (int i = 0; i < 5; i++) call[10].as<float>()[i] = static_cast<float>(sums[i]);
}

// hidden [S, D], weight [V, D], labels [S], weights [S] -> logprobs [S], entropies [S], is_top [S]
void logprob_head(const Call& call) {
  Head head = head_of(call);
  const int64_t S = head.hidden.dim(0);
  expect_size(call, 3, "weights", S, DType::f32);
  float *logprobs = call[4].as<float>(), *entropies = call[5].as<float>(), *is_top = call[6].as<float>();
  for (int64_t s = 0; s < S; s++) {
    logprobs[s] = entropies[s] = is_top[s] = 0;
    if (call[3].as<float>()[s] != 0) head.positions.push_back(s);
  }
  head.with_top = head.with_entropy = true;
  head.finish = [&](int64_t s, const LogitSums& sums, float* picked) {
    logprobs[s] = static_cast<float>(*picked - sums.rest_lse);
    entropies[s] = static_cast<float>(sums.entropy);
    is_top[s] = sums.is_top;
    return 0.0;
  };
  run_head(head);
}

}  // namespace

PANGU_FUNCTION(PolicyHead) { policy_head(call, true); }
PANGU_FUNCTION(PolicyHeadValue) { policy_head(call, false); }
PANGU_FUNCTION(LogprobHead) { logprob_head(call); }

}  // namespace pangu
