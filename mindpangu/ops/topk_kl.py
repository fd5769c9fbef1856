"""Cross-entropy and KL(teacher || student) of a chunk of logits, with the teacher known at its K most likely tokens.

N positions, V vocabulary (of a rank: its columns), K teacher top-k. "The rest" of a row are the tokens outside the K.
"""

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops
from mindspore.ops.primitive import constexpr

from . import ascendc, kernels
from .arguments import expect_at_least, expect_shape, expect_type
from .kernels import is_ascendc, is_native

TAILS = ("bucket", "renormalised_teacher", "renormalised_both", "truncated")
MAX_TOP_K = 64  # of the AscendC operators
_MASKED = -1e30
_TINY = 1e-37  # about the smallest normal float32: keeps log finite where the probability beside it is zero
_NO_TOKEN = 2**31 - 1


def topk_kl(logits_NV, labels_N, teacher_ids_NK, teacher_logprobs_NK, ce_weights_N, kl_weights_N, temperature=1.0,
            tail="bucket", with_gradient=True):
    """Cross-entropy and forward KL to the teacher per position, in nats, and the gradient of their weighted sum.

    labels_N, teacher_ids_NK: int32; ids distinct in a row, most likely first. teacher_logprobs_NK: natural log with
    respect to the whole vocabulary, at temperature 1; -inf for a token that the teacher excludes. The teacher's mass
    outside the K tokens is one more outcome, the tail; the student's tail is its mass on all other tokens. A
    temperature t acts on these K + 1 outcomes of both (p^(1/t), normalised) and the KL is multiplied by t^2, so that
    gradients keep their size (Hinton et al. 2015, arXiv:1503.02531, section 2). With p, q the teacher's and student's
    outcomes and P, Q their sums over the K tokens, `tail` is one of
        bucket                  sum p log(p/q) + p_tail log(p_tail/q_tail)      a lower bound of the full KL
        renormalised_teacher    sum (p/P) log((p/P)/q)
        renormalised_both       sum (p/P) log((p/P)/(q/Q))
        truncated               sum p log(p/q)                                  can be negative
    Returns ce_N, kl_N, teacher_mass_N (P at temperature 1), agreement_N (1 where both have the same top token), all
    float32, and dlogits_NV = d(sum(ce_weights * ce + kl_weights * kl))/dlogits in the logits' dtype, or one zero
    without gradient; none of them is differentiable. Raises ValueError for a temperature that is not positive, an
    unknown tail, and shapes or types that do not fit, naming them.
    """
    form_2 = _form(temperature, tail)
    arguments = (logits_NV, labels_N, teacher_ids_NK, teacher_logprobs_NK, ce_weights_N, kl_weights_N)
    _check(*_described(arguments), is_ascendc("topk_kl"), None)
    if is_ascendc("topk_kl"):
        return losses_by_operator(*arguments, temperature, tail, with_gradient)
    if is_native("topk_kl"):
        ce_N, kl_N, teacher_mass_N, agreement_N, dlogits_NV = _kernel()(*arguments, form_2)
        if not with_gradient:
            dlogits_NV = ops.zeros((1,), logits_NV.dtype)
        return ce_N, kl_N, teacher_mass_N, agreement_N, dlogits_NV
    stats = _stats(logits_NV, labels_N, teacher_ids_NK, 0)
    return _from_stats(*arguments, *stats, temperature, tail, with_gradient, 0, logits_NV.shape[1])


def topk_kl_of_part(logits_NV, labels_N, teacher_ids_NK, teacher_logprobs_NK, ce_weights_N, kl_weights_N, offset,
                    vocab_size, all_max, all_sum, temperature=1.0, tail="bucket", with_gradient=True):
    """topk_kl where a rank has the logits of tokens offset to offset + V - 1 only; the other arguments are all ranks'.

    all_max(x), all_sum(x): the largest and the sum of all ranks' float32 tensors x, such as ops.AllReduce with
    ReduceOp.MAX and with SUM (a CPU has no MAX; AllGather and amax are one). They see N (K + 4) numbers in all,
    whatever V is. Returns what topk_kl returns, the same on every rank, and dlogits_NV of the rank's own tokens.
    """
    _form(temperature, tail)
    arguments = (logits_NV, labels_N, teacher_ids_NK, teacher_logprobs_NK, ce_weights_N, kl_weights_N)
    _check(*_described(arguments), is_ascendc("topk_kl"), (offset, vocab_size))
    if not is_ascendc("topk_kl"):
        stats = _of_all_ranks(_stats(logits_NV, labels_N, teacher_ids_NK, offset), all_max, all_sum)
        return _from_stats(*arguments, *stats, temperature, tail, with_gradient, offset, vocab_size)
    operand = ascendc.as_operand(logits_NV)
    stats = _of_all_ranks(_stats_operator()(operand, labels_N, teacher_ids_NK, offset), all_max, all_sum)
    outputs = _from_stats_operator(with_gradient)(operand, *arguments[1:], *stats, temperature, _place(tail),
                                                  with_gradient, offset, vocab_size)
    return outputs[:4] + (ops.cast(outputs[4], logits_NV.dtype),)


def losses_by_operator(logits_NV, labels_N, teacher_ids_NK, teacher_logprobs_NK, ce_weights_N, kl_weights_N,
                       temperature=1.0, tail="bucket", with_gradient=True):
    """topk_kl by PanguTopkKl."""
    outputs = _operator(with_gradient)(ascendc.as_operand(logits_NV), labels_N, teacher_ids_NK, teacher_logprobs_NK,
                                       ce_weights_N, kl_weights_N, temperature, _place(tail), with_gradient)
    return outputs[:4] + (ops.cast(outputs[4], logits_NV.dtype),)


def _stats(logits_NV, labels_N, teacher_ids_NK, offset):
    """What a rank knows of its tokens: the rest's maximum, sum of exponentials over it and its first token, and the
    logits of the K and of the label, -inf where they are another rank's."""
    logits = ops.cast(logits_NV, ms.float32)
    num_columns = logits.shape[1]
    columns_NK, is_here_NK = _columns(teacher_ids_NK, offset, num_columns)
    top_NK = _chosen(logits, columns_NK, is_here_NK)
    labels_N1, label_is_here_N1 = _columns(ops.expand_dims(labels_N, 1), offset, num_columns)
    rest_NV = _rest(logits, columns_NK, is_here_NK)
    rest_max_N1 = ops.amax(rest_NV, -1, True)
    rest_sum_N = ops.exp(rest_NV - rest_max_N1).sum(-1)
    rest_argmax_N = ops.cast(ops.argmax(rest_NV, -1), ms.int32) + offset
    label_N = _chosen(logits, labels_N1, label_is_here_N1).reshape(-1)
    return rest_max_N1.reshape(-1), rest_sum_N, rest_argmax_N, top_NK, label_N


def _columns(tokens_NK, offset, num_columns):
    """The tokens' columns, 0 for those that are not among them; and 1 for those that are."""
    columns = tokens_NK - offset
    is_here = ops.logical_and(columns >= 0, columns < num_columns)
    return columns * ops.cast(is_here, ms.int32), is_here


def _chosen(logits_NV, columns_NK, is_here_NK):
    values_NK = ops.gather_d(logits_NV, 1, columns_NK)
    return ops.select(is_here_NK, values_NK, ops.full_like(values_NK, -float("inf")))


def _rest(logits_NV, columns_NK, is_here_NK):
    """The logits, far below all others at the columns. Finite: a difference of two infinities is none."""
    is_top_NV = ops.tensor_scatter_elements(ops.zeros_like(logits_NV), columns_NK, ops.cast(is_here_NK, ms.float32), 1,
                                            "add")
    rest_NV = ops.maximum(logits_NV, ops.full_like(logits_NV, _MASKED))
    return ops.select(is_top_NV > 0, ops.full_like(logits_NV, _MASKED), rest_NV)


def _of_all_ranks(stats, all_max, all_sum):
    rest_max_N, rest_sum_N, rest_argmax_N, top_NK, label_N = stats
    maxima = all_max(ops.concat((top_NK, ops.stack((label_N, rest_max_N), 1)), 1))
    num_top = top_NK.shape[1]
    largest_N = maxima[:, num_top + 1]
    rest_sum_N = all_sum(rest_sum_N * ops.exp(rest_max_N - largest_N))
    # The first token wins: the smallest one, as the largest negative; floats hold tokens below 2^24.
    first_N = ops.select(rest_max_N == largest_N, ops.cast(rest_argmax_N, ms.float32),
                         ops.full_like(largest_N, float(_NO_TOKEN)))
    rest_argmax_N = ops.cast(-all_max(-first_N), ms.int32)
    return largest_N, rest_sum_N, rest_argmax_N, maxima[:, :num_top], maxima[:, num_top]


def _from_stats(logits_NV, labels_N, teacher_ids_NK, teacher_logprobs_NK, ce_weights_N, kl_weights_N, rest_max_N,
                rest_sum_N, rest_argmax_N, top_NK, label_N, temperature, tail, with_gradient, offset, vocab_size):
    num_top = teacher_ids_NK.shape[1]
    has_tail = num_top < vocab_size  # with all tokens kept nothing is left, and 1 - P is rounding noise
    top_max_N = ops.amax(top_NK, -1)
    # Sums of exponentials are taken over `most`, and so are differences: they keep what logits of 1e4 have.
    most_N = ops.maximum(top_max_N, rest_max_N) if has_tail else top_max_N
    most_N1 = ops.expand_dims(most_N, 1)
    total_N = ops.exp(top_NK - most_N1).sum(-1)
    if has_tail:
        total_N = total_N + rest_sum_N * ops.exp(rest_max_N - most_N)
    log_total_N = ops.log(total_N)
    log_total_N1 = ops.expand_dims(log_total_N, 1)
    ce_N = (most_N - label_N) + log_total_N

    # Log-probabilities of the K + 1 outcomes. The student's tail is a sum over the other tokens: 1 - Q would cancel
    # when Q is close to 1.
    student_NK = ops.maximum(top_NK - most_N1, ops.full_like(top_NK, _MASKED)) - log_total_N1
    teacher_mass_N = ops.minimum(ops.exp(teacher_logprobs_NK).sum(-1), ops.ones_like(ce_N))
    teacher_tail_N1 = ops.expand_dims(1.0 - teacher_mass_N, 1)
    # Finite where the probability is zero, so that 0 log 0 is 0.
    p, q = ops.maximum(teacher_logprobs_NK, ops.full_like(teacher_logprobs_NK, _MASKED)), student_NK
    if has_tail:
        p = ops.concat((p, ops.log(ops.maximum(teacher_tail_N1, ops.full_like(teacher_tail_N1, _TINY)))), -1)
        rest_N1 = ops.expand_dims((rest_max_N - most_N) + ops.log(rest_sum_N), 1)
        q = ops.concat((q, rest_N1 - log_total_N1), -1)
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

    # The student's top token: the first of equal ones.
    first_N = ops.select(rest_max_N >= most_N, rest_argmax_N, ops.full_like(rest_argmax_N, _NO_TOKEN))
    if not has_tail:
        first_N = ops.full_like(rest_argmax_N, _NO_TOKEN)
    top_first_NK = ops.select(top_NK >= most_N1, teacher_ids_NK, ops.full_like(teacher_ids_NK, _NO_TOKEN))
    first_N = ops.minimum(first_N, ops.amin(top_first_NK, -1))
    agreement_N = ops.cast(first_N == teacher_ids_NK[:, 0], ms.float32)
    if not with_gradient:
        return ce_N, kl_N, teacher_mass_N, agreement_N, ops.zeros((1,), logits_NV.dtype)

    # Backwards: d kl / d q, through the two normalisations, to the gradient in the K + 1 log-probabilities.
    grad = ops.exp(p) * -scale
    if tail == "renormalised_both":
        grad = grad - ops.exp(q) * grad.sum(-1, True)
    if tail != "bucket" and has_tail:
        grad = ops.concat((grad, ops.zeros_like(teacher_tail_N1)), -1)
    if temperature != 1.0:
        grad = (grad - ops.exp(q_outcomes) * grad.sum(-1, True)) / temperature
    grad = grad * ops.expand_dims(kl_weights_N, 1)
    ce_weights_N1 = ops.expand_dims(ce_weights_N, 1)
    # A top-k log-probability moves with its logit and -lse, the tail's with every other logit and -lse.
    logits = ops.cast(logits_NV, ms.float32)
    columns_NK, is_here_NK = _columns(teacher_ids_NK, offset, logits.shape[1])
    labels_N1, label_is_here_N1 = _columns(ops.expand_dims(labels_N, 1), offset, logits.shape[1])
    dlogits = ops.exp((logits - most_N1) - log_total_N1) * (ce_weights_N1 - grad.sum(-1, True))
    if has_tail:
        shifted = _rest(logits, columns_NK, is_here_NK) - ops.expand_dims(rest_max_N, 1)
        dlogits = dlogits + ops.exp(shifted) / ops.expand_dims(rest_sum_N, 1) * grad[:, num_top:]
    dlogits = ops.tensor_scatter_elements(dlogits, columns_NK, grad[:, :num_top] * ops.cast(is_here_NK, ms.float32), 1,
                                          "add")
    dlogits = ops.tensor_scatter_elements(dlogits, labels_N1, -ce_weights_N1 * ops.cast(label_is_here_N1, ms.float32),
                                          1, "add")
    return ce_N, kl_N, teacher_mass_N, agreement_N, ops.cast(dlogits, logits_NV.dtype)


@constexpr
def _kernel():
    return kernels.custom("TopkKl", out_shape=_shapes, out_dtype=_dtypes)


@constexpr
def _operator(with_gradient):
    return ascendc.custom("PanguTopkKl", out_shape=_shapes if with_gradient else _value_shapes, out_dtype=_dtypes)


@constexpr
def _stats_operator():
    return ascendc.custom("PanguTopkKlStats", out_shape=_stats_shapes, out_dtype=_stats_dtypes)


@constexpr
def _from_stats_operator(with_gradient):
    return ascendc.custom("PanguTopkKlFromStats", out_shape=_shapes if with_gradient else _value_shapes,
                          out_dtype=_dtypes)


@constexpr
def _place(tail):
    return TAILS.index(tail)


@constexpr
def _form(temperature, tail):
    return form(temperature, tail)


def form(temperature, tail, *more):
    """What the CPU's kernels take: a float32 tensor of the temperature, the tail's place in TAILS, and further
    numbers."""
    if temperature <= 0:
        raise ValueError(f"temperature={temperature}: expected a positive number.")
    if tail not in TAILS:
        raise ValueError(f"tail={tail!r}: expected one of {TAILS}.")
    return Tensor(np.array([temperature, TAILS.index(tail), *more], np.float32))


def _described(tensors):
    """Shapes and types: graph code may not hand tensors to a check."""
    shapes, dtypes = (), ()
    for tensor in tensors:
        shapes = shapes + (tensor.shape,)
        dtypes = dtypes + (tensor.dtype,)
    return shapes, dtypes


@constexpr(check=False)
def _check(shapes, dtypes, by_operator, part):
    """part: (offset, vocab_size) of a rank's columns, None: they are the whole vocabulary."""
    op = "topk_kl" if part is None else "topk_kl_of_part"
    expect_type(op, "logits_NV", dtypes[0], "float16", "bfloat16", "float32")
    expect_shape(op, "logits_NV", shapes[0], (None, None), "positions and vocabulary")
    expect_shape(op, "teacher_ids_NK", shapes[2], (shapes[0][0], None), "positions and K")
    (num_positions, num_columns), num_top = shapes[0], shapes[2][1]
    expect_at_least(op, "logits_NV", num_positions, 1, "positions")
    expect_at_least(op, "logits_NV", num_columns, 1, "columns")
    expect_at_least(op, "teacher_ids_NK", num_top, 1, "columns")
    if part is not None and (part[0] < 0 or part[0] + (num_columns or 0) > part[1]):
        raise ValueError(f"{op}: offset={part[0]} and {num_columns} columns of logits_NV, expected tokens of "
                         f"vocab_size={part[1]}.")
    vocab_size = num_columns if part is None else part[1]
    if None not in (num_top, vocab_size) and num_top > vocab_size:
        raise ValueError(f"{op}: teacher_ids_NK has K={num_top} tokens, expected at most the vocabulary, {vocab_size}.")
    if by_operator and num_top is not None and num_top > MAX_TOP_K:
        raise ValueError(f"{op}: teacher_ids_NK has K={num_top} tokens, expected at most {MAX_TOP_K} of the AscendC "
                         "operator; keep fewer (kd.top_k) or use run.reference_ops=[topk_kl].")
    rows = (num_positions, "a number per position")
    expected = (("labels_N", 1, "int32", *rows), ("teacher_ids_NK", 2, "int32"), ("teacher_logprobs_NK", 3, "float32"),
                ("ce_weights_N", 4, "float32", *rows), ("kl_weights_N", 5, "float32", *rows))
    for argument, place, dtype, *row in expected:
        expect_type(op, argument, dtypes[place], dtype)
        expect_shape(op, argument, shapes[place], *(((row[0],), row[1]) if row else
                                                    ((num_positions, num_top), "positions and K")))


def _shapes(logits, labels, *rest):
    positions = [logits[0]]
    return positions, positions, positions, positions, logits


def _value_shapes(logits, labels, *rest):
    positions = [logits[0]]
    return positions, positions, positions, positions, [1]


def _dtypes(logits, *rest):
    return ms.float32, ms.float32, ms.float32, ms.float32, logits


def _stats_shapes(logits, labels, teacher_ids, offset):
    positions = [logits[0]]
    return positions, positions, positions, teacher_ids, positions


def _stats_dtypes(logits, labels, teacher_ids, offset):
    return ms.float32, ms.float32, ms.int32, ms.float32, ms.float32
