"""Pre-training and SFT: next-token cross-entropy on the supervised tokens. S target slots."""

from mindspore import ops

from ..ops.cross_entropy import cross_entropy
from ..ops.head_loss import HeadLoss

METRICS = ()  # beside the loss itself


def make_loss(model, row_len, logits_chunk):
    """loss_fn(*Batch.arrays() of one micro-batch) -> (loss_sum, [weight_sum]); see runtime.loop for the contract."""

    def logits_loss(logits, labels, weights):
        ce, dlogits = cross_entropy(logits, labels, weights)
        return (ce * weights).sum(), ops.stack((weights.sum(),)), dlogits

    head = HeadLoss(logits_loss, 1, logits_chunk)

    def loss_fn(tokens_T, positions_T, cu_seqlens_C, target_index_S, labels_S, weights_S):
        hidden = ops.gather(model(tokens_T, positions_T, cu_seqlens_C, row_len), target_index_S, 0)
        loss, metrics, _, _ = head(hidden, model.head_weight(), (labels_S, weights_S))
        return loss, metrics

    return loss_fn
