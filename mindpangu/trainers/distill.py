"""Offline distillation: cross-entropy and KL to the teacher's stored top-k. S target slots, K top-k."""

from mindspore import ops

from ..ops.head_loss import TopkKlHead

METRICS = ("ce", "kl", "teacher_mass", "agreement")


def loss_weights(kd):
    """(factor of CE, factor of KL) of a DistillConfig."""
    if kd.ce_on == "off":
        return 0.0, kd.weight
    return (1.0 - kd.weight if kd.loss_form == "convex" else 1.0), kd.weight


def make_loss(model, kd, row_len, logits_chunk, gradients=True, vocab_group=None):
    """loss_fn(*Batch.arrays() of one micro-batch) -> (loss_sum, [weight, ce, kl, teacher mass, agreement sums]).

    The batch's extras are teacher_ids [S, K] and teacher_logprobs [S, K]. See runtime.loop for the contract.
    gradients: False for a loss that is only measured, which costs a third. vocab_group: ranks that divide the
    vocabulary among them, see TopkKlHead.
    """
    head = TopkKlHead(logits_chunk, *loss_weights(kd), kd.temperature, kd.tail, gradients,
                      vocab_group and (vocab_group, model.config.vocab_size))

    def loss_fn(tokens_T, positions_T, cu_seqlens_C, target_index_S, labels_S, weights_S, teacher_ids_SK,
                teacher_logprobs_SK):
        hidden = ops.gather(model(tokens_T, positions_T, cu_seqlens_C, row_len), target_index_S, 0)
        weight = model.head_weight() if vocab_group is None else model.stored_head_weight()
        loss, metrics = head(hidden, weight, labels_S, weights_S, teacher_ids_SK, teacher_logprobs_SK)
        return loss, metrics

    return loss_fn
