"""The output projection with its loss against torch autograd in double precision."""

import socket
import subprocess
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mindspore import Tensor

from mindpangu.ops.head_loss import CrossEntropyHead, LogprobHead, PolicyHead, TopkKlHead
from mindpangu.ops.topk_kl import TAILS

pytestmark = pytest.mark.usefixtures("kernel")
MODES = pytest.mark.parametrize("mode", ["eager", "graph"])
hypothesis_settings = settings(max_examples=15, deadline=None,
                               suppress_health_check=[HealthCheck.function_scoped_fixture])
# Relative to the sums of absolute values, see `expected`. MindSpore's exp on CPU has an error of up to 5e-6.
RTOL = 1e-5
# Against the same rounded operands: gradients of the logits are rounded to bfloat16 twice, by at most 2^-8 each time.
BF16_RTOL = 2**-7


def case(seed=0, num_positions=11, hidden_size=8, vocab_size=20, k=5):
    """hidden, weight, labels (some in the top-k), weights (some zero), the teacher's ids and log-probabilities."""
    random = np.random.default_rng(seed)
    hidden = random.normal(0, 1, (num_positions, hidden_size)).astype(np.float32)
    weight = random.normal(0, 2 / hidden_size**0.5, (vocab_size, hidden_size)).astype(np.float32)
    ids = np.argsort(random.random((num_positions, vocab_size)), -1)[:, :k].astype(np.int32)
    teacher = random.dirichlet(np.ones(k), num_positions) * (0.9 if k < vocab_size else 1)
    labels = random.integers(0, vocab_size, num_positions).astype(np.int32)
    labels[::2] = ids[::2, -1]
    weights = random.uniform(0, 2, num_positions).astype(np.float32)
    weights[1::4] = 0
    return hidden, weight, labels, weights, ids, np.log(teacher).astype(np.float32)


CLIP_LOW, CLIP_HIGH, KL_FACTOR = 0.8, 1.28, 0.3
# Log-ratios far from where the loss has corners: log 0.8 = -0.22, log 1.28 = 0.25, and 20.
LOG_RATIOS = (-25, -18, -2, -0.4, -0.1, 0, 0.1, 0.4, 2, 18, 25)


def policy_case(hidden, weight, labels, weights, seed=0):
    """The targets of PolicyHead: some positions have a weight or a denominator alone, some have no advantage, and the
    label's log-probabilities lie at all of LOG_RATIOS from the policy's."""
    random = np.random.default_rng(seed)
    size = len(hidden)
    logits = hidden.astype(np.float64) @ weight.astype(np.float64).T
    logprobs = (logits - np.logaddexp.reduce(logits, -1)[:, None])[np.arange(size), labels]
    denominators = random.uniform(0.5, 2, size) * (weights != 0)
    denominators[::5] = 0
    denominators[1::8] = 1  # also where the weight is 0
    advantages = random.normal(0, 1, size) * (random.random(size) < 0.8)
    old, ref = (logprobs - random.choice(LOG_RATIOS, size) * random.uniform(0.9, 1.1, size) for _ in range(2))
    return labels, weights, *(array.astype(np.float32) for array in (denominators, advantages, old, ref))


def expected_policy(hidden, weight, labels, weights, denominators, advantages, old, ref):
    """As `expected`, of PolicyHead: its gradient is autograd's, not ours."""
    hidden, weight = (torch.tensor(array, dtype=torch.float64, requires_grad=True) for array in (hidden, weight))
    w, n, a, old, ref = (torch.tensor(array, dtype=torch.float64) for array in (weights, denominators, advantages, old,
                                                                                ref))
    logits = hidden @ weight.T
    logits.retain_grad()
    policy = torch.log_softmax(logits, -1)
    logprobs = policy.gather(1, torch.tensor(labels, dtype=torch.long)[:, None])[:, 0]
    logprobs.retain_grad()
    ratio = (logprobs - old).clamp(-20, 20).exp()
    surrogate = -torch.minimum(ratio * a, ratio.clamp(CLIP_LOW, CLIP_HIGH) * a)
    to_ref = (ref - logprobs).clamp(-20, 20)
    kl = to_ref.exp() - to_ref - 1
    clipped = ((a > 0) & (ratio > CLIP_HIGH) | (a < 0) & (ratio < CLIP_LOW)).double()
    entropy = -(policy.exp() * policy).sum(-1)
    loss = (w * (surrogate + KL_FACTOR * kl)).sum()
    loss.backward()
    sums = np.array([each.sum().item() for each in (n, w * surrogate, n * kl, n * clipped, n * entropy)])
    # A log-probability is as uncertain as its logits, whose terms are of the size of a nat or more, and so is the
    # relative size of an exponential.
    size = (logits.abs().amax(-1) + 1).detach()
    kl_size = (to_ref.exp() + to_ref.abs() + 1).detach() * size
    surrogate_size = (torch.maximum(ratio, ratio.clamp(CLIP_LOW, CLIP_HIGH)) * a).abs().detach() * size
    terms = w * (surrogate_size + KL_FACTOR * kl_size)
    scales = [n.sum(), w @ surrogate_size, n @ kl_size, n.sum(), n @ (size * (entropy + 1))]
    grad = (terms[:, None] * policy.detach().exp()).scatter_add(1, torch.tensor(labels, dtype=torch.long)[:, None],
                                                                terms[:, None])
    values = loss.item(), sums, hidden.grad.numpy(), weight.grad.numpy()
    return values, (terms.sum().item(), np.array([each.item() for each in scales]), (grad @ weight.abs()).max().item(),
                    (grad.T @ hidden.abs()).max().item())


def policy_head(chunk_size, **options):
    return PolicyHead(chunk_size, CLIP_LOW, CLIP_HIGH, KL_FACTOR, **options)


def expected(hidden, weight, labels, weights, ids, logprobs, ce_factor, kl_factor, temperature=1.0, tail="bucket"):
    """loss, metric sums and gradients in hidden and weight, by the definitions; and the scales of their errors.

    A value's scale is its size and a nat per position; a gradient's is its largest sum of absolute terms, because
    what cancels in a sum leaves its rounding.
    """
    hidden, weight = (torch.tensor(array, dtype=torch.float64, requires_grad=True) for array in (hidden, weight))
    logits, weights = hidden @ weight.T, torch.tensor(weights, dtype=torch.float64)
    logits.retain_grad()
    student, ids = torch.log_softmax(logits, -1), torch.tensor(ids, dtype=torch.long)
    ce = -student.gather(1, torch.tensor(labels, dtype=torch.long)[:, None])[:, 0]
    k, p = ids.shape[1], torch.tensor(logprobs, dtype=torch.float64)
    mass, q = p.exp().sum(-1), student.gather(1, ids)
    if k < logits.shape[1]:
        p = torch.cat([p, torch.log1p(-p.exp().sum(-1, keepdim=True))], 1)
        q = torch.cat([q, student.scatter(1, ids, -torch.inf).logsumexp(-1, keepdim=True)], 1)
    p, q = torch.log_softmax(p / temperature, -1), torch.log_softmax(q / temperature, -1)
    if tail != "bucket":
        p, q = p[:, :k], q[:, :k]
    if tail.startswith("renormalised"):
        p = torch.log_softmax(p, -1)
    if tail == "renormalised_both":
        q = torch.log_softmax(q, -1)
    kl = temperature**2 * (p.exp() * (p - q)).sum(-1)
    agreement = (logits.argmax(-1) == ids[:, 0]).double()
    loss = (weights * (ce_factor * ce + kl_factor * kl)).sum()
    loss.backward()
    sums = np.array([weights.sum().item(), *((weights * each).sum().item() for each in (ce, kl, mass, agreement))])
    values = loss.item(), sums, hidden.grad.numpy(), weight.grad.numpy()
    # The student's probability less the wanted one: where they cancel, the rounding of each stays.
    size = logits.grad.abs() + (ce_factor + kl_factor) * weights[:, None] * student.detach().exp()
    scales = (abs(values[0]) + sums[0], np.abs(sums) + sums[0], (size @ weight.abs()).max().item(),
              (size.T @ hidden.abs()).max().item())
    return values, scales


def value_and_gradients(head, inputs, mode="eager"):
    """loss, metric sums and gradients in hidden and weight, as float32 arrays; inputs: tensors or arrays."""
    value_and_grad = ms.value_and_grad(head, (0, 1), has_aux=True)

    def run(*inputs):
        return value_and_grad(*inputs)

    inputs = [each if isinstance(each, Tensor) else Tensor(each) for each in inputs]
    (loss, metrics), gradients = (ms.jit(run) if mode == "graph" else run)(*inputs)
    return [ms.ops.cast(each, ms.float32).asnumpy() for each in (loss, metrics, *gradients)]


def check(ours, values_and_scales, rtol=RTOL):
    for name, our, value, scale in zip(("loss", "metrics", "d_hidden", "d_weight"), ours, *values_and_scales,
                                       strict=True):
        assert (np.abs(our - value) <= rtol * (scale + 1e-6)).all(), name


@MODES
@pytest.mark.parametrize("chunk_size", [1, 4, 11])
def test_cross_entropy_matches_double_precision_whatever_the_chunks(mode, chunk_size):
    hidden, weight, labels, weights, ids, logprobs = case()
    head = CrossEntropyHead(chunk_size)

    def loss(hidden, weight, labels, weights, scale):
        # Used twice and scaled, as under gradient accumulation: bprop's scalar is neither 1 nor the only path.
        loss_sum, metrics = head(hidden * 2.0, weight, labels, weights)
        return scale * loss_sum + (hidden * weight[:11]).sum(), metrics

    ours = value_and_gradients(loss, (hidden, weight, labels, weights, np.float32(-0.7)), mode)
    (value, metrics, d_hidden, d_weight), scales = expected(2 * hidden, weight, labels, weights, ids, logprobs, 1, 0)
    wanted = (-0.7 * value + (hidden * weight[:11]).sum(), metrics[:1], -1.4 * d_hidden + weight[:11],
              -0.7 * d_weight + np.pad(hidden, ((0, 9), (0, 0))))
    check(ours, (wanted, (scales[0], scales[1][:1], 2 * scales[2], scales[3])))


@MODES
@pytest.mark.parametrize("chunk_size", [4, 100])
@pytest.mark.parametrize(("tail", "form"), list(zip(
    TAILS, [(0.1, 0.9), (1.0, 0.5, 2.0), (0.0, 1.0, 0.5), (1.0, 2.0)], strict=True)))
def test_topk_kl_matches_double_precision_whatever_the_chunks(mode, chunk_size, tail, form):
    head = TopkKlHead(chunk_size, *form, tail=tail)
    check(value_and_gradients(head, case(), mode), expected(*case(), *form, tail=tail))


@MODES
@pytest.mark.parametrize("chunk_size", [1, 4, 11])
def test_policy_loss_matches_double_precision_whatever_the_chunks(mode, chunk_size):
    hidden, weight, labels, weights, *_ = case(num_positions=50)
    targets = policy_case(hidden, weight, labels, weights)
    _, _, denominators, advantages, old, _ = targets
    values, scales = expected_policy(hidden, weight, *targets)
    assert 3 <= values[1][3] and ((weights == 0) & (denominators > 0)).any() and (weights[denominators == 0] > 0).any()
    assert (advantages == 0).any()
    check(value_and_gradients(policy_head(chunk_size), (hidden, weight, *targets), mode), (values, scales))

    head = policy_head(chunk_size)

    def loss(hidden, weight, scale, *targets):
        # Scaled, as hidden states are by a temperature and the loss by the batch's denominator.
        loss_sum, metrics = head(hidden / 0.5, weight, *targets)
        return scale * loss_sum, metrics

    ours = value_and_gradients(loss, (hidden / 2, weight, np.float32(-0.7), *targets), mode)
    value, metrics, d_hidden, d_weight = values
    check(ours, ((-0.7 * value, metrics, -1.4 * d_hidden, -0.7 * d_weight), (scales[0], scales[1], 2 * scales[2],
                                                                             scales[3])))


@hypothesis_settings
@given(num_positions=st.integers(1, 70), hidden_size=st.integers(1, 70), vocab_size=st.integers(1, 700),
       seed=st.integers(0, 99))
def test_policy_loss_of_any_size_matches_double_precision(num_positions, hidden_size, vocab_size, seed):
    hidden, weight, labels, weights, *_ = case(seed, num_positions, hidden_size, vocab_size, 1)
    targets = policy_case(hidden, weight, labels, weights, seed)
    ours = value_and_gradients(policy_head(32), (hidden, weight, *targets))
    check(ours, expected_policy(hidden, weight, *targets))


@MODES
def test_the_policy_gradient_is_the_slope_of_the_policy_loss(mode):
    hidden, weight, labels, weights, *_ = case(num_positions=23, hidden_size=6)
    targets = policy_case(hidden, weight, labels, weights)
    kept = np.abs(targets[4]) < 15  # the others' loss is too large beside their neighbours' for float32 differences
    targets = [array[kept] for array in targets]
    hidden = hidden[kept]
    _, _, *gradients = value_and_gradients(policy_head(8), (hidden, weight, *targets), mode)
    random = np.random.default_rng(0)
    for place, array in enumerate((hidden, weight)):
        direction = random.normal(0, 1, array.shape).astype(np.float32)
        direction /= np.linalg.norm(direction)
        losses = []
        for step in (1e-2, -1e-2):
            moved = [hidden, weight]
            moved[place] = array + np.float32(step) * direction
            losses.append(expected_policy(*moved, *targets)[0][0])
        slope = (losses[0] - losses[1]) / 2e-2
        np.testing.assert_allclose((gradients[place] * direction).sum(), slope, rtol=1e-3)  # differences: step^2


@MODES
@pytest.mark.parametrize("chunk_size", [1, 4, 11])
@pytest.mark.parametrize("num_live", [11, 6, 0])
def test_label_logprobs_match_double_precision_and_are_zero_without_weight(mode, chunk_size, num_live):
    hidden, weight, labels, weights, *_ = case()
    weights[num_live:] = 0  # and every fourth
    logits = hidden.astype(np.float64) @ weight.astype(np.float64).T
    labels[::3] = logits.argmax(-1)[::3]
    logprobs = logits - np.logaddexp.reduce(logits, -1)[:, None]
    wanted = np.stack([logprobs[np.arange(11), labels], -(np.exp(logprobs) * logprobs).sum(-1),
                       logits.argmax(-1) == labels]) * (weights != 0)
    head = LogprobHead(chunk_size)

    def run(*arrays):
        return head(*arrays)

    ours = [each.asnumpy() for each in (ms.jit(run) if mode == "graph" else run)(*map(Tensor, (hidden, weight, labels,
                                                                                              weights)))]
    assert all(each.dtype == np.float32 and each.shape == (11,) for each in ours)
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=RTOL * 5)  # logits of up to 7
    assert num_live == 0 or 0 < wanted[2].sum() < (weights != 0).sum()


@hypothesis_settings
@given(num_positions=st.integers(1, 70), hidden_size=st.integers(1, 70), vocab_size=st.integers(1, 700),
       spread=st.sampled_from([0, 0.1, 1, 10]), seed=st.integers(0, 99))
def test_label_logprobs_of_any_size_match_double_precision(num_positions, hidden_size, vocab_size, spread, seed):
    hidden, weight, labels, weights, *_ = case(seed, num_positions, hidden_size, vocab_size, 1)
    weight *= np.float32(spread)
    logits = hidden.astype(np.float64) @ weight.astype(np.float64).T
    labels[::2] = logits.argmax(-1)[::2]
    logprobs = logits - np.logaddexp.reduce(logits, -1)[:, None]
    ours = [each.asnumpy() for each in LogprobHead(32)(*map(Tensor, (hidden, weight, labels, weights)))]
    live = weights != 0
    wanted = np.stack([logprobs[np.arange(num_positions), labels], -(np.exp(logprobs) * logprobs).sum(-1)]) * live
    scale = np.abs(hidden).astype(np.float64) @ np.abs(weight).T
    assert (np.abs(ours[:2] - wanted) <= RTOL * (1 + np.log(vocab_size) + scale.max(-1))).all()
    if vocab_size > 1:
        second, first = np.sort(logits, -1)[:, -2:].T
        live &= first - second > RTOL * scale.max(-1)  # closer ones may change places in float32
    assert (ours[2] == (logits.argmax(-1) == labels))[live].all()


def test_log_probabilities_carry_no_gradient():
    hidden, weight, labels, weights, *_ = case()
    head = LogprobHead(4)

    def loss(hidden, weight, labels, weights):
        logprobs, entropies, is_top = head(hidden, weight, labels, weights)
        return (logprobs + entropies + is_top).sum() + (3 * hidden).sum() + weight.sum(), logprobs

    gradients = value_and_gradients(loss, (hidden, weight, labels, weights))[2:]
    assert (gradients[0] == 3).all() and (gradients[1] == 1).all()


@hypothesis_settings
@given(data=st.data(), num_positions=st.integers(1, 70), hidden_size=st.integers(1, 70), vocab_size=st.integers(1, 700),
       tail=st.sampled_from(TAILS), temperature=st.sampled_from([0.5, 1.0, 2.0]), seed=st.integers(0, 99))
def test_any_size_matches_double_precision(data, num_positions, hidden_size, vocab_size, tail, temperature, seed):
    k = data.draw(st.sampled_from(sorted({1, min(10, vocab_size), min(40, vocab_size)})))
    inputs = case(seed, num_positions, hidden_size, vocab_size, k)
    head = TopkKlHead(32, 0.3, 0.7, temperature, tail)
    # Log-ratios of some nats multiply the error of an exponential, 1 / temperature that of a log-probability.
    check(value_and_gradients(head, inputs), expected(*inputs, 0.3, 0.7, temperature, tail),
          2 * RTOL / min(1, temperature))


@pytest.mark.parametrize("operands", ["bfloat16 tensors", "bfloat16 products"])
@hypothesis_settings
@given(num_positions=st.integers(1, 70), hidden_size=st.integers(1, 70), vocab_size=st.integers(12, 700),
       tail=st.sampled_from(TAILS), seed=st.integers(0, 99))
def test_bfloat16_matches_double_precision_on_rounded_operands(operands, num_positions, hidden_size, vocab_size, tail,
                                                               seed, kernel, cpu_library):
    if kernel == "reference":
        return  # composed from primitives, most of which MindSpore lacks in bfloat16
    inputs = case(seed, num_positions, hidden_size, vocab_size, 10)
    rounded = [torch.tensor(array).bfloat16().float().numpy() for array in inputs[:2]]
    head = TopkKlHead(32, 0.3, 0.7, tail=tail)
    if operands == "bfloat16 tensors":
        ours = value_and_gradients(head, [Tensor(array, ms.bfloat16) for array in inputs[:2]] + list(inputs[2:]))
    else:
        cpu_library.pangu_set_bf16_products(1)
        try:
            ours = value_and_gradients(head, inputs)
        finally:
            cpu_library.pangu_set_bf16_products(0)
    values, scales = expected(*rounded, *inputs[2:], 0.3, 0.7, tail=tail)
    check(ours[:2] + [0, 0], (values[:2] + (0, 0), scales))  # products of rounded numbers are summed in float32
    check(ours, (values, scales), BF16_RTOL)


@pytest.mark.parametrize("operands", ["bfloat16 tensors", "bfloat16 products"])
@hypothesis_settings
@given(num_positions=st.integers(1, 70), hidden_size=st.integers(1, 70), vocab_size=st.integers(1, 700),
       seed=st.integers(0, 99))
def test_policy_and_logprobs_in_bfloat16_match_double_precision_on_rounded_operands(
        operands, num_positions, hidden_size, vocab_size, seed, kernel, cpu_library):
    if kernel == "reference":
        return
    hidden, weight, labels, weights, *_ = case(seed, num_positions, hidden_size, vocab_size, 1)
    rounded = [torch.tensor(array).bfloat16().float().numpy() for array in (hidden, weight)]
    targets = policy_case(*rounded, labels, weights, seed)
    inputs = [hidden, weight]
    if operands == "bfloat16 tensors":
        inputs = [Tensor(array, ms.bfloat16) for array in inputs]
    cpu_library.pangu_set_bf16_products(int(operands == "bfloat16 products"))
    try:
        ours = value_and_gradients(policy_head(32), [*inputs, *targets])
        logprobs = LogprobHead(32)(*(each if isinstance(each, Tensor) else Tensor(each) for each in inputs),
                                   Tensor(labels), Tensor(weights))[0].asnumpy()
    finally:
        cpu_library.pangu_set_bf16_products(0)
    values, scales = expected_policy(*rounded, *targets)
    check(ours[:2] + [0, 0], (values[:2] + (0, 0), scales))
    check(ours, (values, scales), BF16_RTOL)
    logits = torch.tensor(rounded[0]).double() @ torch.tensor(rounded[1]).double().T
    wanted = torch.log_softmax(logits, -1).gather(1, torch.tensor(labels).long()[:, None])[:, 0].numpy()
    np.testing.assert_allclose(logprobs, wanted * (weights != 0), rtol=0, atol=RTOL * (1 + logits.abs().max().item()))


def test_bfloat16_keeps_the_relative_precision_of_small_probabilities(kernel, cpu_library):
    if kernel == "reference":
        return
    # One position with hidden state 1: the weight's gradient is that of the logits, which the weight is.
    logits = -np.arange(0, 64, 0.25, dtype=np.float32)  # exact in bfloat16
    arrays = (np.ones((1, 1), np.float32), logits[:, None], np.zeros(1, np.int32), np.ones(1, np.float32))
    inputs = [Tensor(array, ms.bfloat16) for array in arrays[:2]] + list(arrays[2:])
    ours = value_and_gradients(CrossEntropyHead(8), inputs)[3][:, 0]
    wanted = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum()
    wanted[0] -= 1
    assert 0 < wanted[-1] < 1e-28
    np.testing.assert_allclose(ours, wanted, rtol=2**-7)


def test_positions_without_weight_leave_before_the_product(kernel):
    hidden, *rest = case()
    dropped = rest[2] == 0
    if kernel == "native":
        hidden[dropped] = np.nan  # the reference multiplies by zero, which NaN survives
    policy = rest[1], rest[2], rest[2], *(np.ones(len(hidden), np.float32),) * 3
    for head, inputs in ((TopkKlHead(4, 0.5, 0.5), (hidden, *rest)), (CrossEntropyHead(4), (hidden, *rest[:3])),
                         (policy_head(4), (hidden, rest[0], *policy))):
        ours = value_and_gradients(head, inputs)
        assert dropped.any() and all(np.isfinite(each).all() for each in ours)
        assert not ours[2][dropped].any() and ours[2][~dropped].any(-1).all()


@MODES
@pytest.mark.parametrize("num_positions", [0, 1, 9])
def test_without_targets_loss_metrics_and_gradients_are_zero(mode, num_positions, kernel):
    if kernel == "reference" and num_positions == 0:
        return  # MindSpore's reductions of nothing are not defined on CPU
    inputs = case(num_positions=max(1, num_positions))
    inputs = [inputs[0][:num_positions], inputs[1], *(each[:num_positions] for each in inputs[2:])]
    inputs[3] = 0 * inputs[3]
    for _ in range(2):  # twice: memory that happens to be zero would pass once
        for head, arrays in ((TopkKlHead(4, 0.5, 0.5), inputs), (CrossEntropyHead(4), inputs[:4]),
                             (policy_head(4), inputs[:4] + [inputs[3], *[inputs[3] + 1] * 3])):
            ours = value_and_gradients(head, arrays, mode)
            assert [each.shape for each in ours[2:]] == [each.shape for each in inputs[:2]]
            assert not any(each.any() for each in ours)


def test_large_logits_and_a_certain_teacher_stay_right(kernel):
    hidden, weight, labels, weights, ids, logprobs = case()
    hidden[:, 0], weight[:, 0] = 100, 100  # all logits of a position are 1e4 and some
    hidden[0] *= -1
    logprobs[:3] = np.log(np.array([1 - 4e-3, 1e-3, 1e-3, 1e-3, 0.5e-3]))
    logprobs[3, 1:] = -np.inf
    logprobs[3, 0] = np.log(0.5)
    inputs = hidden, weight, labels, weights, ids, logprobs
    theirs = expected(*inputs[:5], np.maximum(logprobs, -300), 0.5, 0.5)
    # Products of 1e4 in float32 have a spacing of 1e-3, which is what differences of logits are known to.
    check(value_and_gradients(TopkKlHead(4, 0.5, 0.5), inputs), theirs, 2e-3)


def test_equal_logits_agree_where_the_teachers_token_is_the_first():
    # 700 tokens span groups of tokens; all logits are zero but those of the third position.
    weight = np.zeros((700, 4), np.float32)
    weight[600] = 1
    hidden = np.array([[0] * 4, [0] * 4, [1] * 4, [1] * 4], np.float32)
    ids = np.array([[0, 5], [650, 0], [600, 3], [3, 600]], np.int32)
    inputs = (hidden, weight, np.zeros(4, np.int32), np.array([1, 2, 4, 8], np.float32), ids,
              np.full((4, 2), np.log(0.4), np.float32))
    assert value_and_gradients(TopkKlHead(4, 0.5, 0.5), inputs)[1][4] == 1 + 4
    labels = np.array([0, 650, 600, 3], np.int32)
    assert LogprobHead(4)(*map(Tensor, (hidden, weight, labels, inputs[3])))[2].asnumpy().tolist() == [1, 0, 1, 0]
    weight[[0, 599]] = 1  # the largest are 0, 599 and 600, far from each other and near
    labels = np.array([0, 599, 600, 1], np.int32)
    inputs = np.ones((4, 4), np.float32), weight, labels, inputs[3]
    assert LogprobHead(4)(*map(Tensor, inputs))[2].asnumpy().tolist() == [1, 0, 0, 0]


@MODES
def test_without_gradients_the_value_is_the_same_and_training_is_refused(mode):
    inputs = case()
    for head, value, arrays in ((TopkKlHead(4, 0.5, 0.5), TopkKlHead(4, 0.5, 0.5, gradients=False), inputs),
                                (CrossEntropyHead(4), CrossEntropyHead(4, gradients=False), inputs[:4]),
                                (policy_head(4), policy_head(4, gradients=False),
                                 inputs[:2] + policy_case(*inputs[:4]))):

        def run(*arrays, value=value):
            return value(*arrays)

        loss, metrics = (ms.jit(run) if mode == "graph" else run)(*map(Tensor, arrays))
        ours = value_and_gradients(head, arrays, mode)
        np.testing.assert_allclose(loss.asnumpy(), ours[0], rtol=1e-6)
        np.testing.assert_allclose(metrics.asnumpy(), ours[1], rtol=1e-6)
        with pytest.raises(ValueError, match="gradients=False, for validation: make it with gradients=True to train"):
            value_and_gradients(value, arrays, mode)


def test_results_do_not_depend_on_the_number_of_threads(kernel, cpu_library):
    if kernel == "reference":
        return
    inputs = case(0, 300, 520, 1100, 10)
    for products in (0, 1):
        cpu_library.pangu_set_bf16_products(products)
        results = []
        try:
            for num_threads in (1, 2, 3):
                cpu_library.pangu_set_num_threads(num_threads)
                results.append(value_and_gradients(TopkKlHead(64, 0.5, 0.5), inputs) +
                               value_and_gradients(policy_head(64), inputs[:2] + policy_case(*inputs[:4])))
        finally:
            cpu_library.pangu_set_num_threads(2)
            cpu_library.pangu_set_bf16_products(0)
        for other in results[1:]:
            assert all(np.array_equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_wrong_argument_is_named_by_the_native_kernel(kernel):
    if kernel == "reference":
        return
    inputs = list(map(Tensor, case()))
    for place, wrong, message in [
        (2, np.full(11, 20, np.int32), "labels is 20: expected a token from 0 to 19"),
        (4, np.full((11, 5), -1, np.int32), "teacher_ids is -1: expected a token from 0 to 19"),
        (1, np.zeros((20, 7), np.float32), r"weight is \[20, 7\]: expected \[vocabulary, 8\]"),
        (3, np.zeros(10, np.float32), r"weights is \[10\]: expected 11 elements"),
        (0, np.zeros((11, 8), np.float16), "hidden is float16: expected float32 or bfloat16"),
    ]:
        with pytest.raises(RuntimeError, match=f"TopkKlHead on CPU: {message}"):
            loss, _ = TopkKlHead(4, 0.5, 0.5)(*inputs[:place], Tensor(wrong), *inputs[place + 1:])
            loss.asnumpy()
    inputs = inputs[:2] + list(map(Tensor, policy_case(*case()[:4])))
    for place, name in enumerate(("weights", "denominators", "advantages", "old_logprobs", "ref_logprobs"), 3):
        with pytest.raises(RuntimeError, match=rf"PolicyHead on CPU: {name} is \[10\]: expected 11 elements"):
            loss, _ = policy_head(4)(*inputs[:place], Tensor(np.zeros(10, np.float32)), *inputs[place + 1:])
            loss.asnumpy()
    with pytest.raises(RuntimeError, match="LogprobHead on CPU: labels is 20: expected a token from 0 to 19"):
        LogprobHead(4)(*inputs[:2], Tensor(np.full(11, 20, np.int32)), inputs[3])[0].asnumpy()


_MANY_POSITIONS = """
import ctypes, sys
import numpy as np
S, D, V, k = 2048, 16, 100_000, 10  # logits of all positions: 820 MB in float32, 410 MB in bfloat16
library = ctypes.CDLL(sys.argv[1])
library.pangu_set_num_threads(2)
random = np.random.default_rng(0)
hidden, weight = random.standard_normal((S, D), np.float32), random.standard_normal((V, D), np.float32) / 4
labels = random.integers(0, V, S).astype(np.int32)
ids = np.sort(random.integers(0, V // k, (S, k)).astype(np.int32) + V // k * np.arange(k, dtype=np.int32), -1)
logprobs, form = np.full((S, k), np.log(0.09), np.float32), np.array([1, 0, 0.5, 0.5], np.float32)

def head(weights):
    outputs = [np.ones(shape, np.float32) for shape in ((1,), (5,), (S, D), (V, D))]
    tensors = [hidden, weight, labels, weights, ids, logprobs, form, *outputs]
    count, names = len(tensors), {np.dtype("float32"): b"float32", np.dtype("int32"): b"int32"}
    shapes = [(ctypes.c_int64 * t.ndim)(*t.shape) for t in tensors]
    failed = library.TopkKlHead(
        count, (ctypes.c_void_p * count)(*(t.ctypes.data for t in tensors)),
        (ctypes.c_int * count)(*(t.ndim for t in tensors)),
        (ctypes.POINTER(ctypes.c_int64) * count)(*(ctypes.cast(s, ctypes.POINTER(ctypes.c_int64)) for s in shapes)),
        (ctypes.c_char_p * count)(*(names[t.dtype] for t in tensors)), None, None)
    assert not failed
    return outputs

def memory_mb(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1]) / 1024

for bf16_products, tolerance in ((1, 2**-7), (0, 1e-5)):
    library.pangu_set_bf16_products(bf16_products)
    before = memory_mb("VmRSS")
    whole = head(np.ones(S, np.float32))
    print(memory_mb("VmHWM") - before, flush=True)
    # The sums over all positions are those over parts, which fit one chunk.
    parts = [head((np.arange(S) // 256 == i).astype(np.float32)) for i in range(8)]
    for one, several in zip(whole, zip(*parts)):
        total = np.sum(several, 0, np.float64)
        assert np.abs(one - total).max() <= tolerance * np.abs(total).max()
"""


def test_positions_come_in_chunks_that_bound_memory_and_add_up(kernel, cpu_library):
    if kernel == "reference":
        return
    done = subprocess.run([sys.executable, "-c", _MANY_POSITIONS, str(cpu_library.path)], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    growth_mb = [float(line) for line in done.stdout.split()]
    assert len(growth_mb) == 2 and 100 < max(growth_mb) and max(growth_mb) < 256 + 7  # the weight's gradient: 6.4 MB


# Compiled: in MindSpore 2.9's eager mode on a CPU a collective may read its input before the op before it wrote it.
TWO_RANKS = """
import sys
import mindspore as ms, numpy as np
from mindspore import Tensor
from mindspore.communication import get_rank, init

ms.set_device("CPU")
init()
from mindpangu.ops.collectives import Group
from mindpangu.ops.head_loss import TopkKlHead

rank, arrays = get_rank(), np.load(sys.argv[1])
group = Group.of(range(2), rank, 2)
hidden, weight, *targets = (arrays[name] for name in arrays.files)
own = [Tensor(np.ascontiguousarray(np.split(array, 2)[rank])) for array in (hidden, *targets)]
outputs = {}
for chunk_size in (4, 100):
    head = TopkKlHead(chunk_size, 0.3, 0.7, 2.0, "bucket", vocab_parallel=(group, len(weight)))
    value = TopkKlHead(chunk_size, 0.3, 0.7, 2.0, "bucket", vocab_parallel=(group, len(weight)), gradients=False)
    run = ms.jit(ms.value_and_grad(head, (0, 1), has_aux=True))
    (loss, metrics), grads = run(own[0], Tensor(weight), *own[1:])
    outputs |= {f"{chunk_size} {name}": tensor.asnumpy() for name, tensor in
                zip(("loss", "metrics", "d_hidden", "d_weight"), (loss, metrics, *grads))}
    outputs[f"{chunk_size} value"] = ms.jit(value)(own[0], Tensor(weight), *own[1:])[0].asnumpy()
np.savez(f"rank{rank}", **outputs)
"""


@pytest.mark.long
def test_two_ranks_that_divide_the_vocabulary_have_the_loss_and_gradients_of_one(tmp_path, kernel):
    if kernel == "native":
        pytest.skip("the parts are composed from primitives either way")
    arrays = case(num_positions=22, vocab_size=21)  # 11 tokens of the vocabulary for one rank, 10 for the other
    (tmp_path / "two_ranks.py").write_text(TWO_RANKS)
    np.savez(tmp_path / "case", *arrays)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # msrun starts "python": the one that runs the tests comes first.
    command = ["env", f"PATH={Path(sys.executable).parent}:/usr/bin:/bin", "msrun", "--worker_num=2",
               "--local_worker_num=2", f"--master_port={port}", "--log_dir=log", "--join=True", "two_ranks.py",
               "case.npz"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    log = "".join(path.read_text(errors="replace") for path in sorted(tmp_path.glob("log/worker_*.log")))
    assert done.returncode == 0, log[-4000:]
    first, second = (np.load(tmp_path / f"rank{rank}.npz") for rank in range(2))
    values, scales = expected(*arrays, 0.3, 0.7, 2.0)
    for chunk in ("4", "100"):
        d_weight = first[f"{chunk} d_weight"] + second[f"{chunk} d_weight"]
        assert not first[f"{chunk} d_weight"][11:].any() and not second[f"{chunk} d_weight"][:11].any()
        loss = first[f"{chunk} loss"] + second[f"{chunk} loss"]
        outputs = (loss, first[f"{chunk} metrics"] + second[f"{chunk} metrics"],
                   np.concatenate([first[f"{chunk} d_hidden"], second[f"{chunk} d_hidden"]]), d_weight)
        check(outputs, (values, scales))
        assert first[f"{chunk} value"] + second[f"{chunk} value"] == loss
