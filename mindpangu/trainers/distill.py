"""Offline distillation: cross-entropy and KL to the teacher's stored top-k. S target slots, K top-k."""

from mindspore import ops

from ..ops.head_loss import HeadLoss
from ..ops.topk_kl import topk_kl

METRICS = ("ce", "kl", "teacher_mass", "agreement")


def loss_weights(kd):
    """(factor of CE, factor of KL) of a DistillConfig."""
    if kd.ce_on == "off":
        return 0.0, kd.weight
    return (1.0 - kd.weight if kd.loss_form == "convex" else 1.0), kd.weight


def make_loss(model, kd, row_len, logits_chunk):
    """loss_fn(*Batch.arrays() of one micro-batch) -> (loss_sum, [weight, ce, kl, teacher mass, agreement sums]).

    The batch's extras are teacher_ids [S, K] and teacher_logprobs [S, K]. See runtime.loop for the contract.
    """
    ce_factor, kl_factor = loss_weights(kd)
    temperature, tail = kd.temperature, kd.tail

    def logits_loss(logits, labels, weights, teacher_ids, teacher_logprobs):
        ce, kl, mass, agreement, dlogits = topk_kl(logits, labels, teacher_ids, teacher_logprobs, weights * ce_factor,
                                                   weights * kl_factor, temperature, tail)
        ce_sum, kl_sum = (ce * weights).sum(), (kl * weights).sum()
        metrics = ops.stack((weights.sum(), ce_sum, kl_sum, (mass * weights).sum(), (agreement * weights).sum()))
        return ce_sum * ce_factor + kl_sum * kl_factor, metrics, dlogits

    head = HeadLoss(logits_loss, 1 + len(METRICS), logits_chunk)

    def loss_fn(tokens_T, positions_T, cu_seqlens_C, target_index_S, labels_S, weights_S, teacher_ids_SK,
                teacher_logprobs_SK):
        hidden = ops.gather(model(tokens_T, positions_T, cu_seqlens_C, row_len), target_index_S, 0)
        loss, metrics, _, _ = head(hidden, model.head_weight(),
                                   (labels_S, weights_S, teacher_ids_SK, teacher_logprobs_SK))
        return loss, metrics

    return loss_fn
