// Cross-entropy and KL(teacher || student) of one position, from the few numbers that its logits leave; see
// ops/topk_kl.py for the definitions.
#pragma once

#include <cstdint>

#include "common.h"

namespace pangu {

enum class Tail { bucket, renormalised_teacher, renormalised_both, truncated };  // in the order of ops/topk_kl.py

struct LossForm {
  double temperature = 1;
  Tail tail = Tail::bucket;
};
// From the float32 tensor [temperature, tail, ...].
LossForm loss_form(const Call& call, int tensor);

// The teacher's k most likely tokens and the student's logits of one position. k = 0: cross-entropy alone.
struct Position {
  int k;
  const float* teacher_logprobs;  // [k]
  const float* top_logits;        // [k], the student's
  float label_logit;
  int label_slot;    // the label's place among the k, or -1
  double rest_lse;   // log-sum-exp of the student's logits outside the k; -inf where there are none
  bool has_tail;     // k is smaller than the vocabulary
  double ce_weight, kl_weight;
};

struct PositionLoss {
  double ce, kl, teacher_mass;
  // The gradient of a token outside the k and not the label is exp(logit - rest_lse) * rest_grad.
  double rest_grad, label_grad;
};

// Writes the gradients of the k logits to top_grads, without the label's.
PositionLoss position_loss(const LossForm& form, const Position& position, float* top_grads);

// Raises Error unless the tensor has that many elements of that dtype.
void expect_size(const Call& call, int tensor, const char* argument, int64_t size, DType dtype);
// Raises Error unless all ids lie in [0, vocab_size).
void expect_ids(const Call& call, int tensor, const char* argument, int64_t vocab_size);

}  // namespace pangu
