"""The policy-gradient loss of a chunk of logits with its gradient, and the log-probabilities of its labels.

N positions, V vocabulary. Per position, with the policy's log-probability l of the label, the advantage A, and the
log-probabilities o and f of the label under the policy that sampled it and under the reference,

    r = exp(l - o)                                    the ratio
    surrogate = -min(r A, clip(r, clip_low, clip_high) A)
    k3 = exp(f - l) - (f - l) - 1                     an estimate of KL(policy || reference), never negative
    loss = surrogate + kl_factor k3

    d loss / d l = -r A, or 0 where the min takes the clipped side  +  kl_factor (1 - exp(f - l))

The differences of logarithms are clamped to [-20, 20], with no gradient beyond, so that no exponential overflows.

Sources: PPO arXiv:1707.06347, equation 7; different bounds for both sides DAPO arXiv:2503.14476, section 3.1; k3
http://joschu.net/blog/kl-approx.html; both together GRPO arXiv:2402.03300, equations 3 and 4.
"""

import mindspore as ms
from mindspore import ops

_LIMIT = 20.0


def label_logprobs(logits_NV, labels_N):
    """Log softmax of the label, the softmax's entropy in nats, and 1 where the label has the largest logit (the first
    of equals) or 0; all float32 [N]."""
    logprobs_NV = ops.log_softmax(ops.cast(logits_NV, ms.float32), -1)
    return _of_labels(logprobs_NV, labels_N), _entropies(logprobs_NV), _is_top(logits_NV, labels_N)


def policy_loss(logits_NV, labels_N, weights_N, advantages_N, old_logprobs_N, ref_logprobs_N, clip_low, clip_high,
                kl_factor):
    """The terms of the module's description and the gradient of sum(weights * loss).

    labels_N: int32; the other [N] float32. clip_low, clip_high: bounds of the ratio, such as 0.8 and 1.28.
    Returns surrogate_N, k3_N, clipped_N (1 where the min takes the clipped side), entropy_N (of the policy, in nats),
    all float32, and dlogits_NV in the logits' dtype; none is differentiable.
    """
    logprobs_NV = ops.log_softmax(ops.cast(logits_NV, ms.float32), -1)
    logprobs_N = _of_labels(logprobs_NV, labels_N)
    log_ratio_N = logprobs_N - old_logprobs_N
    ratio_N = ops.exp(ops.clamp(log_ratio_N, -_LIMIT, _LIMIT))
    clipped_ratio_N = ops.clamp(ratio_N, clip_low, clip_high)
    # Strictly worse: where both sides are equal, as at A = 0 or inside the bounds, the ratio's own gradient counts.
    is_clipped_N = clipped_ratio_N * advantages_N < ratio_N * advantages_N
    surrogate_N = -ops.minimum(ratio_N * advantages_N, clipped_ratio_N * advantages_N)
    to_ref_N = ref_logprobs_N - logprobs_N
    clamped_N = ops.clamp(to_ref_N, -_LIMIT, _LIMIT)
    growth_N = ops.expm1(clamped_N)
    clipped_N = ops.cast(is_clipped_N, ms.float32)

    moves_N = (1.0 - clipped_N) * _inside(log_ratio_N)
    grad_N = weights_N * (-advantages_N * ratio_N * moves_N - kl_factor * growth_N * _inside(to_ref_N))
    grad_N1 = ops.expand_dims(grad_N, 1)
    dlogits_NV = ops.tensor_scatter_elements(-grad_N1 * ops.exp(logprobs_NV), ops.expand_dims(labels_N, 1), grad_N1, 1,
                                             "add")
    return (surrogate_N, growth_N - clamped_N, clipped_N, _entropies(logprobs_NV),
            ops.cast(dlogits_NV, logits_NV.dtype))


def _inside(x_N):
    return ops.cast(ops.abs(x_N) < _LIMIT, ms.float32)


def _of_labels(logprobs_NV, labels_N):
    return ops.gather_d(logprobs_NV, 1, ops.expand_dims(labels_N, 1)).reshape(-1)


def _entropies(logprobs_NV):
    return -(ops.exp(logprobs_NV) * logprobs_NV).sum(-1)


def _is_top(logits_NV, labels_N):
    return ops.cast(ops.cast(ops.argmax(logits_NV, -1), ms.int32) == labels_N, ms.float32)
