"""The output projection and the loss on its logits, chunk by chunk, so that all positions' logits never exist at once.

S supervised positions, D hidden, V vocabulary, C positions of a chunk, M metrics.
"""

import mindspore as ms
from mindspore import nn, ops


class HeadLoss(nn.Cell):
    """Loss sum of hidden states under the output projection.

    logits_loss(logits_CV, *targets_C) -> (loss_sum, metric_sums_M, dlogits_CV) on at most chunk_size positions.
    The gradients are computed in the forward pass, while a chunk's logits are at hand; the backward pass multiplies
    them by the incoming scalar. Metrics carry no gradient.
    """

    def __init__(self, logits_loss, num_metrics, chunk_size):
        super().__init__()
        self.logits_loss = logits_loss
        self.num_metrics = num_metrics
        self.chunk_size = chunk_size
        self.project = ops.MatMul(transpose_b=True)
        self.hidden_grad = ops.MatMul()
        self.weight_grad = ops.MatMul(transpose_a=True)

    def run_chunk(self, hidden_CD, weight_VD, targets):
        loss, metrics, dlogits = self.logits_loss(self.project(hidden_CD, weight_VD), *targets)
        d_weight = ops.cast(self.weight_grad(dlogits, hidden_CD), ms.float32)  # summed over chunks in float32
        return loss, metrics, self.hidden_grad(dlogits, weight_VD), d_weight

    def construct(self, hidden_SD, weight_VD, targets):
        """targets: a tuple of tensors [S, ...]. Returns loss_sum, metric_sums_M and the gradients that bprop reads."""
        num_positions, hidden_size = hidden_SD.shape
        chunk = self.chunk_size
        if num_positions <= chunk:
            return self.run_chunk(hidden_SD, weight_VD, targets)
        num_chunks = (num_positions + chunk - 1) // chunk
        padding = num_chunks * chunk - num_positions  # the last chunk's missing positions, of weight zero
        hidden = _in_chunks(hidden_SD, padding, chunk)
        chunked = ()
        for target in targets:
            chunked = chunked + (_in_chunks(target, padding, chunk),)
        loss = ops.zeros((), ms.float32)
        metrics = ops.zeros((self.num_metrics,), ms.float32)
        # ops.zeros, not zeros_like: beside bprop's zeros_like the graph compiler fails ("func graph is empty").
        d_hidden = ops.zeros(hidden.shape, hidden.dtype)
        d_weight = ops.zeros(weight_VD.shape, ms.float32)
        i = ops.zeros((), ms.int32)
        while i < num_chunks:
            parts = ()
            for target in chunked:
                parts = parts + (target[i],)
            chunk_loss, chunk_metrics, d_chunk, d_weight_chunk = self.run_chunk(hidden[i], weight_VD, parts)
            loss = loss + chunk_loss
            metrics = metrics + chunk_metrics
            d_hidden = ops.tensor_scatter_update(d_hidden, i.reshape(1, 1), ops.expand_dims(d_chunk, 0))
            d_weight = d_weight + d_weight_chunk
            i = i + 1
        d_hidden = d_hidden.reshape(num_chunks * chunk, hidden_size)[:num_positions]
        return loss, metrics, d_hidden, d_weight

    def bprop(self, hidden_SD, weight_VD, targets, out, dout):
        d_targets = ()
        for target in targets:
            d_targets = d_targets + (ops.zeros_like(target),)
        d_hidden = ops.cast(out[2] * dout[0], hidden_SD.dtype)
        return d_hidden, ops.cast(out[3] * dout[0], weight_VD.dtype), d_targets


def _in_chunks(x, padding, chunk):
    """[S, ...] with `padding` zero rows at the end, as [S / chunk, chunk, ...]."""
    if padding > 0:
        x = ops.concat((x, ops.zeros((padding,) + x.shape[1:], x.dtype)), 0)
    return x.reshape((x.shape[0] // chunk, chunk) + x.shape[1:])
