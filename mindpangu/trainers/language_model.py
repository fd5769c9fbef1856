"""Pre-training and SFT: next-token cross-entropy on the supervised tokens. S target slots."""

from mindspore import ops

from ..ops.head_loss import CrossEntropyHead

METRICS = ()  # beside the loss itself


def make_loss(model, row_len, logits_chunk, gradients=True):
    """loss_fn(*Batch.arrays() of one micro-batch) -> (loss_sum, [weight_sum]); see runtime.loop for the contract.

    gradients: False for a loss that is only measured, which costs a third.
    """
    head = CrossEntropyHead(logits_chunk, gradients)

    def loss_fn(tokens_T, positions_T, cu_seqlens_C, target_index_S, labels_S, weights_S):
        hidden = ops.gather(model(tokens_T, positions_T, cu_seqlens_C, row_len), target_index_S, 0)
        loss, metrics = head(hidden, model.head_weight(), labels_S, weights_S)
        return loss, metrics

    return loss_fn
