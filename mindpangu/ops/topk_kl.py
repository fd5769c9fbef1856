"""Cross-entropy and KL(teacher || student) of a chunk of logits, with the teacher known at its K most likely tokens.

N positions, V vocabulary, K teacher top-k.
"""

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops
from mindspore.ops.primitive import constexpr

from . import kernels
from .kernels import is_native

TAILS = ("bucket", "renormalised_teacher", "renormalised_both", "truncated")
_MASKED = -1e30
_TINY = 1e-37  # about the smallest normal float32: keeps log finite where the probability beside it is zero


def topk_kl(logits_NV, labels_N, teacher_ids_NK, teacher_logprobs_NK, ce_weights_N, kl_weights_N, temperature=1.0,
            tail="bucket"):
    """Cross-entropy and forward KL to the teacher per position, in nats, and the gradient of their weighted sum.

    teacher_ids_NK: int32, distinct in a row, most likely first. teacher_logprobs_NK: natural log with respect to the
    whole vocabulary, at temperature 1; -inf for a token that the teacher excludes. The teacher's mass outside the K
    tokens is one more outcome, the tail; the student's tail is its mass on all other tokens. A temperature t acts on
    these K + 1 outcomes of both (p^(1/t), normalised) and the KL is multiplied by t^2, so that gradients keep their
    size (Hinton et al. 2015, arXiv:1503.02531, section 2). With p, q the teacher's and student's outcomes and P, Q
    their sums over the K tokens, `tail` is one of
        bucket                  sum p log(p/q) + p_tail log(p_tail/q_tail)      a lower bound of the full KL
        renormalised_teacher    sum (p/P) log((p/P)/q)
        renormalised_both       sum (p/P) log((p/P)/(q/Q))
        truncated               sum p log(p/q)                                  can be negative
    Returns ce_N, kl_N, teacher_mass_N (P at temperature 1), agreement_N (1 where both have the same top token), all
    float32, and dlogits_NV = d(sum(ce_weights * ce + kl_weights * kl))/dlogits in the logits' dtype; none of them is
    differentiable. Raises ValueError for a temperature that is not positive and an unknown tail.
    """
    form_2 = _form(temperature, tail)
    if is_native("topk_kl"):
        return _kernel()(logits_NV, labels_N, teacher_ids_NK, teacher_logprobs_NK, ce_weights_N, kl_weights_N, form_2)
    logits = ops.cast(logits_NV, ms.float32)
    num_top = teacher_ids_NK.shape[1]
    lse_N1 = ops.logsumexp(logits, -1, True)
    labels_N1 = ops.expand_dims(labels_N, 1)
    ce_N = (lse_N1 - ops.gather_d(logits, 1, labels_N1)).reshape(-1)

    # Log-probabilities of the K + 1 outcomes. The student's tail is a sum over the other tokens: 1 - Q would cancel
    # when Q is close to 1.
    student_NK = ops.gather_d(logits, 1, teacher_ids_NK) - lse_N1
    in_top_k_NV = ops.tensor_scatter_elements(ops.zeros_like(logits), teacher_ids_NK, ops.ones_like(student_NK), 1)
    rest_NV = logits + in_top_k_NV * _MASKED
    rest_lse_N1 = ops.logsumexp(rest_NV, -1, True)
    teacher_mass_N = ops.minimum(ops.exp(teacher_logprobs_NK).sum(-1), ops.ones_like(ce_N))
    teacher_tail_N1 = ops.expand_dims(1.0 - teacher_mass_N, 1)
    # Finite where the probability is zero, so that 0 log 0 is 0.
    p, q = ops.maximum(teacher_logprobs_NK, ops.full_like(teacher_logprobs_NK, _MASKED)), student_NK
    has_tail = num_top < logits.shape[1]  # with all tokens kept nothing is left, and 1 - P is rounding noise
    if has_tail:
        p = ops.concat((p, ops.log(ops.maximum(teacher_tail_N1, ops.full_like(lse_N1, _TINY)))), -1)
        q = ops.concat((q, rest_lse_N1 - lse_N1), -1)
    if temperature != 1.0:
        p = ops.log_softmax(p / temperature, -1)
        q = ops.log_softmax(q / temperature, -1)
    q_outcomes = q
    if tail != "bucket":
        p, q = p[:, :num_top], q[:, :num_top]
    if tail == "renormalised_teacher" or tail == "renormalised_both":
        p = ops.log_softmax(p, -1)
    if tail == "renormalised_both":
        q = ops.log_softmax(q, -1)
    scale = temperature * temperature
    kl_N = (ops.exp(p) * (p - q)).sum(-1) * scale

    # Backwards: d kl / d q, through the two normalisations, to the gradient in the K + 1 log-probabilities.
    grad = ops.exp(p) * -scale
    if tail == "renormalised_both":
        grad = grad - ops.exp(q) * grad.sum(-1, True)
    if tail != "bucket" and has_tail:
        grad = ops.concat((grad, ops.zeros_like(lse_N1)), -1)
    if temperature != 1.0:
        grad = (grad - ops.exp(q_outcomes) * grad.sum(-1, True)) / temperature
    kl_weights_N1 = ops.expand_dims(kl_weights_N, 1)
    ce_weights_N1 = ops.expand_dims(ce_weights_N, 1)
    grad = grad * kl_weights_N1
    # A top-k log-probability moves with its logit and -lse, the tail's with every other logit and -lse.
    dlogits = ops.exp(logits - lse_N1) * (ce_weights_N1 - grad.sum(-1, True))
    if has_tail:
        dlogits = dlogits + ops.exp(rest_NV - rest_lse_N1) * grad[:, num_top:]
    dlogits = ops.tensor_scatter_elements(dlogits, teacher_ids_NK, grad[:, :num_top], 1, "add")
    dlogits = ops.tensor_scatter_elements(dlogits, labels_N1, -ce_weights_N1, 1, "add")

    agreement_N = ops.cast(ops.cast(ops.argmax(logits, -1), ms.int32) == teacher_ids_NK[:, 0], ms.float32)
    return ce_N, kl_N, teacher_mass_N, agreement_N, ops.cast(dlogits, logits_NV.dtype)


@constexpr
def _kernel():
    return kernels.custom("TopkKl", out_shape=_shapes, out_dtype=_dtypes)


@constexpr
def _form(temperature, tail):
    return form(temperature, tail)


def form(temperature, tail, *more):
    """What the kernels take: a float32 tensor of the temperature, the tail's place in TAILS, and further numbers."""
    if temperature <= 0:
        raise ValueError(f"temperature={temperature}: expected a positive number.")
    if tail not in TAILS:
        raise ValueError(f"tail={tail!r}: expected one of {TAILS}.")
    return Tensor(np.array([temperature, TAILS.index(tail), *more], np.float32))


def _shapes(logits, labels, *rest):
    positions = [logits[0]]
    return positions, positions, positions, positions, logits


def _dtypes(logits, *rest):
    return ms.float32, ms.float32, ms.float32, ms.float32, logits
