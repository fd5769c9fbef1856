"""The output projection and what is made of its logits, a loss or log-probabilities; the logits of all positions never
exist.

S positions, D hidden, V vocabulary, C positions of a chunk, K teacher top-k, M metrics, G ranks.
"""

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops.primitive import constexpr

from . import kernels
from .collectives import AllGather, AllMax, AllReduce, ReduceScatter
from .cross_entropy import cross_entropy
from .kernels import is_ascendc, is_native
from .policy_loss import label_logprobs, policy_loss
from .topk_kl import form, losses_by_operator, topk_kl, topk_kl_of_part


class CrossEntropyHead(nn.Cell):
    """Cross-entropy of hidden states under the output projection, summed over positions.

    chunk_size: positions whose logits exist at a time; the CPU's native kernel takes as many as 212 MiB hold.
    gradients: False computes none, for validation; asking for them then is an error.
    """

    def __init__(self, chunk_size, gradients=True):
        super().__init__()
        self.gradients = gradients

        def loss_of_chunk(logits, labels, weights):
            if is_ascendc("cross_entropy"):
                # The operator for top-k KL beside a teacher of no weight, whose one token is the label.
                ce, _, _, _, dlogits = losses_by_operator(logits, labels, ops.expand_dims(labels, 1),
                                                          ops.zeros((labels.shape[0], 1), ms.float32), weights,
                                                          ops.zeros_like(weights), with_gradient=gradients)
            else:
                ce, dlogits = cross_entropy(logits, labels, weights)
            return (ce * weights).sum(), ops.stack((weights.sum(),)), dlogits

        self.reference = _ChunkedHead(loss_of_chunk, 1, chunk_size, gradients)

    def construct(self, hidden_SD, weight_VD, labels_S, weights_S):
        """Returns sum(weights * ce), differentiable, and metric_sums_1 = [sum(weights)]. Weight 0: not a target."""
        if not is_native("head_loss"):
            loss, metrics, _, _ = self.reference(hidden_SD, weight_VD, (labels_S, weights_S))
        elif self.gradients:
            loss, metrics, _, _ = _cross_entropy_kernel()(hidden_SD, weight_VD, labels_S, weights_S)
        else:
            loss, metrics = _cross_entropy_value_kernel()(hidden_SD, weight_VD, labels_S, weights_S)
        return loss.reshape(()), metrics


class TopkKlHead(nn.Cell):
    """ce_factor * cross-entropy + kl_factor * KL(teacher || student) of hidden states under the output projection,
    summed over positions; temperature and tail as in topk_kl, chunk_size and gradients as in CrossEntropyHead.

    vocab_parallel: (collectives.Group, vocabulary size): its ranks, which have as many positions each, of their own,
    compute the logits of a chunk of all of them together, each for its share of the vocabulary (Megatron-LM,
    arXiv:1909.08053, section 3).
    """

    def __init__(self, chunk_size, ce_factor, kl_factor, temperature=1.0, tail="bucket", gradients=True,
                 vocab_parallel=None):
        super().__init__()
        self.gradients = gradients
        self.is_divided = vocab_parallel is not None
        self.form = form(temperature, tail, ce_factor, kl_factor)

        def sums(ce, kl, mass, agreement, weights):
            ce_sum, kl_sum = (ce * weights).sum(), (kl * weights).sum()
            metrics = ops.stack((weights.sum(), ce_sum, kl_sum, (mass * weights).sum(), (agreement * weights).sum()))
            return ce_sum * ce_factor + kl_sum * kl_factor, metrics

        def loss_of_chunk(logits, labels, weights, teacher_ids, teacher_logprobs):
            ce, kl, mass, agreement, dlogits = topk_kl(logits, labels, teacher_ids, teacher_logprobs,
                                                       weights * ce_factor, weights * kl_factor, temperature, tail,
                                                       gradients)
            return *sums(ce, kl, mass, agreement, weights), dlogits

        def loss_of_part(logits, offset, vocab_size, all_max, all_sum, own, labels, weights, teacher_ids,
                         teacher_logprobs):
            ce, kl, mass, agreement, dlogits = topk_kl_of_part(
                logits, labels, teacher_ids, teacher_logprobs, weights * ce_factor, weights * kl_factor, offset,
                vocab_size, all_max, all_sum, temperature, tail, gradients)
            return *sums(own(ce), own(kl), own(mass), own(agreement), own(weights)), dlogits

        if vocab_parallel is None:
            self.reference = _ChunkedHead(loss_of_chunk, 5, chunk_size, gradients)
        else:
            self.reference = _DividedHead(loss_of_part, 5, chunk_size, gradients, *vocab_parallel)

    def construct(self, hidden_SD, weight_VD, labels_S, weights_S, teacher_ids_SK, teacher_logprobs_SK):
        """Returns the loss sum, differentiable, and metric_sums_5: the sums over positions of the weight, and of the
        weight times ce, kl, teacher mass and agreement. Weight 0: not a target."""
        if self.is_divided or not is_native("head_loss"):
            loss, metrics, _, _ = self.reference(hidden_SD, weight_VD,
                                                 (labels_S, weights_S, teacher_ids_SK, teacher_logprobs_SK))
        elif self.gradients:
            loss, metrics, _, _ = _topk_kl_kernel()(hidden_SD, weight_VD, labels_S, weights_S, teacher_ids_SK,
                                                    teacher_logprobs_SK, self.form)
        else:
            loss, metrics = _topk_kl_value_kernel()(hidden_SD, weight_VD, labels_S, weights_S, teacher_ids_SK,
                                                    teacher_logprobs_SK, self.form)
        return loss.reshape(()), metrics


class PolicyHead(nn.Cell):
    """The policy-gradient loss of hidden states under the output projection, summed over positions; its terms are those
    of policy_loss, chunk_size and gradients as in CrossEntropyHead."""

    def __init__(self, chunk_size, clip_low, clip_high, kl_factor, gradients=True):
        super().__init__()
        self.gradients = gradients
        self.form = Tensor(np.array([clip_low, clip_high, kl_factor], np.float32))

        def loss_of_chunk(logits, labels, weights, denominators, advantages, old_logprobs, ref_logprobs):
            surrogate, kl, clipped, entropy, dlogits = policy_loss(logits, labels, weights, advantages, old_logprobs,
                                                                   ref_logprobs, clip_low, clip_high, kl_factor)
            surrogate_sum = (surrogate * weights).sum()
            metrics = ops.stack((denominators.sum(), surrogate_sum, (kl * denominators).sum(),
                                 (clipped * denominators).sum(), (entropy * denominators).sum()))
            return surrogate_sum + kl_factor * (kl * weights).sum(), metrics, dlogits

        self.reference = _ChunkedHead(loss_of_chunk, 5, chunk_size, gradients)

    def construct(self, hidden_SD, weight_VD, labels_S, weights_S, denominators_S, advantages_S, old_logprobs_S,
                  ref_logprobs_S):
        """Returns the loss sum, sum(weights * (surrogate + kl_factor * k3)), differentiable, and metric_sums_5: the
        sums over positions of the denominator, weight * surrogate, and the denominator times k3, clipped and entropy.

        denominators_S: what the loss sum will be divided by, summed over positions. Both weights 0: not a target.
        """
        targets = (labels_S, weights_S, denominators_S, advantages_S, old_logprobs_S, ref_logprobs_S)
        if not is_native("head_loss"):
            loss, metrics, _, _ = self.reference(hidden_SD, weight_VD, targets)
        elif self.gradients:
            loss, metrics, _, _ = _policy_kernel()(hidden_SD, weight_VD, *targets, self.form)
        else:
            loss, metrics = _policy_value_kernel()(hidden_SD, weight_VD, *targets, self.form)
        return loss.reshape(()), metrics


class LogprobHead(nn.Cell):
    """Log-probabilities of labels given hidden states under the output projection, and what goes with them; without
    gradients. chunk_size as in CrossEntropyHead."""

    def __init__(self, chunk_size):
        super().__init__()
        self.chunk_size = chunk_size
        self.project = ops.MatMul(transpose_b=True)

    def construct(self, hidden_SD, weight_VD, labels_S, weights_S):
        """Returns logprobs_S, entropies_S and is_top_S as label_logprobs; zeros at positions of weight 0."""
        if is_native("head_loss"):
            return _logprob_kernel()(ops.stop_gradient(hidden_SD), ops.stop_gradient(weight_VD), labels_S, weights_S)
        num_positions, chunk = hidden_SD.shape[0], self.chunk_size
        num_chunks = (num_positions + chunk - 1) // chunk
        padding = num_chunks * chunk - num_positions
        hidden, labels = _in_chunks(hidden_SD, padding, chunk), _in_chunks(labels_S, padding, chunk)
        weight = ops.cast(weight_VD, hidden_SD.dtype)  # a frozen model's may be bfloat16
        is_live_S = weights_S != 0
        # Where only the first positions count, as in a batch with room for more, the chunks behind them are left out.
        counts = ops.cast(is_live_S, ms.int32) * ops.arange(1, num_positions + 1, dtype=ms.int32)
        num_live_chunks = (counts.max() + (chunk - 1)) // chunk
        scores = ops.zeros((num_chunks, 3, chunk), ms.float32)
        i = ops.zeros((), ms.int32)
        while i < num_live_chunks:
            scored = ops.stack(label_logprobs(self.project(hidden[i], weight), labels[i]))
            scores = ops.tensor_scatter_update(scores, i.reshape(1, 1), ops.expand_dims(scored, 0))
            i = i + 1
        scores = scores.transpose(1, 0, 2).reshape(3, num_chunks * chunk)[:, :num_positions]
        is_live = is_live_S.broadcast_to((3, num_positions))
        scores = ops.stop_gradient(ops.select(is_live, scores, ops.zeros_like(scores)))
        return scores[0], scores[1], scores[2]


class _ChunkedHead(nn.Cell):
    """Loss sum of hidden states under the output projection, a chunk of positions at a time.

    logits_loss(logits_CV, *targets_C) -> (loss_sum, metric_sums_M, dlogits_CV) on at most chunk_size positions.
    The gradients are computed in the forward pass, while a chunk's logits are at hand; the backward pass multiplies
    them by the incoming scalar. Metrics carry no gradient.
    """

    def __init__(self, logits_loss, num_metrics, chunk_size, gradients):
        super().__init__()
        self.logits_loss = logits_loss
        self.num_metrics = num_metrics
        self.chunk_size = chunk_size
        self.gradients = gradients
        self.project = ops.MatMul(transpose_b=True)
        self.hidden_grad = ops.MatMul()
        self.weight_grad = ops.MatMul(transpose_a=True)

    def own_rows(self, weight_VD, dtype):
        """What run_chunk takes of the projection."""
        return weight_VD

    def all_rows(self, d_weight_VD):
        """The gradient of all of it, given that of own_rows."""
        return d_weight_VD

    def run_chunk(self, hidden_CD, weight_VD, targets):
        loss, metrics, dlogits = self.logits_loss(self.project(hidden_CD, weight_VD), *targets)
        if not self.gradients:
            return loss, metrics, loss, loss
        d_weight = ops.cast(self.weight_grad(dlogits, hidden_CD), ms.float32)  # summed over chunks in float32
        return loss, metrics, self.hidden_grad(dlogits, weight_VD), d_weight

    def construct(self, hidden_SD, weight_VD, targets):
        """targets: a tuple of tensors [S, ...]. Returns loss_sum, metric_sums_M and the gradients that bprop reads."""
        num_positions, hidden_size = hidden_SD.shape
        weight_VD = self.own_rows(weight_VD, hidden_SD.dtype)
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
        d_hidden = ops.zeros(hidden.shape if self.gradients else (1,), hidden.dtype)
        d_weight = ops.zeros(weight_VD.shape if self.gradients else (1,), ms.float32)
        i = ops.zeros((), ms.int32)
        while i < num_chunks:
            parts = ()
            for target in chunked:
                parts = parts + (target[i],)
            chunk_loss, chunk_metrics, d_chunk, d_weight_chunk = self.run_chunk(hidden[i], weight_VD, parts)
            loss = loss + chunk_loss
            metrics = metrics + chunk_metrics
            if self.gradients:
                d_hidden = ops.tensor_scatter_update(d_hidden, i.reshape(1, 1), ops.expand_dims(d_chunk, 0))
                d_weight = d_weight + d_weight_chunk
            i = i + 1
        if self.gradients:
            d_hidden = d_hidden.reshape(num_chunks * chunk, hidden_size)[:num_positions]
        return loss, metrics, d_hidden, d_weight

    def bprop(self, hidden_SD, weight_VD, targets, out, dout):
        if not self.gradients:
            _refuse()
        d_targets = ()
        for target in targets:
            d_targets = d_targets + (ops.zeros_like(target),)
        d_hidden = ops.cast(out[2] * dout[0], hidden_SD.dtype)
        return d_hidden, self.all_rows(ops.cast(out[3] * dout[0], weight_VD.dtype)), d_targets


class _DividedHead(_ChunkedHead):
    """As _ChunkedHead where each of G ranks has other positions and its share of the vocabulary: the hidden states and
    targets of a chunk are gathered, the gradients of the hidden states summed and handed back. The weight comes as it
    is stored: each rank casts its rows.

    logits_loss(logits, offset, vocab_size, all_max, all_sum, own, *targets): see topk_kl_of_part; all positions of the
    ranks' chunks, of which own(x) are this rank's, whose losses and metrics it returns.
    """

    def __init__(self, logits_loss, num_metrics, chunk_size, gradients, group, vocab_size):
        super().__init__(logits_loss, num_metrics, chunk_size, gradients)
        self.rank, self.size, self.vocab_size = group.rank, group.size, vocab_size
        share = -(-vocab_size // group.size)
        self.first, self.last = min(group.rank * share, vocab_size), min((group.rank + 1) * share, vocab_size)
        self.all_max, self.all_sum = AllMax(group), AllReduce(group)
        self.all_gather, self.reduce_scatter = AllGather(group), ReduceScatter(group)

    def own_rows(self, weight_VD, dtype):
        return ops.cast(weight_VD[self.first:self.last], dtype)

    def all_rows(self, d_weight_VD):
        parts = ()
        if self.first > 0:
            parts = parts + (ops.zeros((self.first, d_weight_VD.shape[1]), d_weight_VD.dtype),)
        parts = parts + (d_weight_VD,)
        if self.last < self.vocab_size:
            parts = parts + (ops.zeros((self.vocab_size - self.last, d_weight_VD.shape[1]), d_weight_VD.dtype),)
        return ops.concat(parts, 0)

    def of_all(self, x):
        """[C, ...] of each rank -> [G C, ...]."""
        return self.all_gather(x).reshape((-1,) + x.shape[1:])

    def run_chunk(self, hidden_CD, weight_VD, targets):
        chunk, hidden_size = hidden_CD.shape
        hidden = self.of_all(hidden_CD)
        everyone = ()
        for target in targets:  # tokens as numbers: below 2^24 a float32 holds them
            everyone = everyone + (ops.cast(self.of_all(ops.cast(target, ms.float32)), target.dtype),)

        def own(x):
            return x.reshape(self.size, chunk)[self.rank]

        loss, metrics, dlogits = self.logits_loss(self.project(hidden, weight_VD), self.first, self.vocab_size,
                                                  self.all_max, self.all_sum, own, *everyone)
        if not self.gradients:
            return loss, metrics, loss, loss
        d_weight = ops.cast(self.weight_grad(dlogits, hidden), ms.float32)
        d_hidden = ops.cast(self.hidden_grad(dlogits, weight_VD), ms.float32).reshape(self.size, chunk, hidden_size)
        return loss, metrics, ops.cast(self.reduce_scatter(d_hidden), hidden_CD.dtype), d_weight


def _in_chunks(x, padding, chunk):
    """[S, ...] with `padding` zero rows at the end, as [S / chunk, chunk, ...]."""
    if padding > 0:
        x = ops.concat((x, ops.zeros((padding,) + x.shape[1:], x.dtype)), 0)
    return x.reshape((x.shape[0] // chunk, chunk) + x.shape[1:])


@constexpr
def _refuse():
    raise ValueError("this loss was made with gradients=False, for validation: make it with gradients=True to train.")


@constexpr
def _cross_entropy_kernel():
    return kernels.custom("CrossEntropyHead", out_shape=_cross_entropy_shapes, out_dtype=_dtypes,
                          bprop=_cross_entropy_bprop)


@constexpr
def _cross_entropy_value_kernel():
    return kernels.custom("CrossEntropyHeadValue", out_shape=_cross_entropy_value_shapes, out_dtype=_value_dtypes,
                          bprop=_cross_entropy_value_bprop)


@constexpr
def _topk_kl_kernel():
    return kernels.custom("TopkKlHead", out_shape=_five_metrics_shapes, out_dtype=_dtypes, bprop=_topk_kl_bprop)


@constexpr
def _topk_kl_value_kernel():
    return kernels.custom("TopkKlHeadValue", out_shape=_five_metrics_value_shapes, out_dtype=_value_dtypes,
                          bprop=_topk_kl_value_bprop)


@constexpr
def _policy_kernel():
    return kernels.custom("PolicyHead", out_shape=_five_metrics_shapes, out_dtype=_dtypes, bprop=_policy_bprop)


@constexpr
def _policy_value_kernel():
    return kernels.custom("PolicyHeadValue", out_shape=_five_metrics_value_shapes, out_dtype=_value_dtypes,
                          bprop=_policy_value_bprop)


@constexpr
def _logprob_kernel():
    return kernels.custom("LogprobHead", out_shape=_logprob_shapes, out_dtype=_logprob_dtypes)


def _cross_entropy_shapes(hidden, weight, *targets):
    return [1], [1], hidden, weight


def _cross_entropy_value_shapes(*inputs):
    return [1], [1]


def _five_metrics_shapes(hidden, weight, *targets):
    return [1], [5], hidden, weight


def _five_metrics_value_shapes(*inputs):
    return [1], [5]


def _logprob_shapes(hidden, weight, labels, weights):
    return labels, labels, labels


def _logprob_dtypes(*inputs):
    return ms.float32, ms.float32, ms.float32


def _dtypes(hidden, *rest):
    return ms.float32, ms.float32, hidden, ms.float32


def _value_dtypes(*inputs):
    return ms.float32, ms.float32


def _cross_entropy_bprop(hidden, weight, labels, weights, out, dout):
    d_hidden, d_weight = _scaled(out, dout, hidden, weight)
    return d_hidden, d_weight, ops.zeros_like(labels), ops.zeros_like(weights)


def _topk_kl_bprop(hidden, weight, labels, weights, teacher_ids, teacher_logprobs, form, out, dout):
    d_hidden, d_weight = _scaled(out, dout, hidden, weight)
    return (d_hidden, d_weight, ops.zeros_like(labels), ops.zeros_like(weights), ops.zeros_like(teacher_ids),
            ops.zeros_like(teacher_logprobs), ops.zeros_like(form))


def _policy_bprop(hidden, weight, labels, weights, denominators, advantages, old_logprobs, ref_logprobs, form, out,
                  dout):
    d_hidden, d_weight = _scaled(out, dout, hidden, weight)
    return (d_hidden, d_weight, ops.zeros_like(labels), ops.zeros_like(weights), ops.zeros_like(denominators),
            ops.zeros_like(advantages), ops.zeros_like(old_logprobs), ops.zeros_like(ref_logprobs),
            ops.zeros_like(form))


def _scaled(out, dout, hidden, weight):
    """The kernel's gradients times the incoming scalar."""
    return ops.cast(out[2] * dout[0], hidden.dtype), ops.cast(out[3] * dout[0], weight.dtype)


def _cross_entropy_value_bprop(hidden, weight, labels, weights, out, dout):
    return _refuse()


def _topk_kl_value_bprop(hidden, weight, labels, weights, teacher_ids, teacher_logprobs, form, out, dout):
    return _refuse()


def _policy_value_bprop(hidden, weight, labels, weights, denominators, advantages, old_logprobs, ref_logprobs, form,
                        out, dout):
    return _refuse()
