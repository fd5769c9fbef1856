"""The policy-gradient loss of a chunk of logits against NumPy in double precision, by the formulas of its sources."""

import math

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from mindpangu.ops.policy_loss import label_logprobs, policy_loss

pytestmark = pytest.mark.usefixtures("mindspore_cpu")
MODES = pytest.mark.parametrize("mode", ["eager", "graph"])
# MindSpore's exp on CPU has a relative error of up to 5e-6, and log-probabilities of some nats are known to 1e-6.
RTOL = 2e-5
CLIP_LOW, CLIP_HIGH = 0.8, 1.28


def loss_of_label(logprob, advantage, old, ref):
    """(surrogate, k3, clipped), floats, one position; case by case as PPO's figure 1 draws it."""
    ratio = math.exp(min(20.0, max(-20.0, logprob - old)))
    clipped = False
    if advantage > 0 and ratio > CLIP_HIGH:
        surrogate, clipped = -CLIP_HIGH * advantage, True
    elif advantage < 0 and ratio < CLIP_LOW:
        surrogate, clipped = -CLIP_LOW * advantage, True
    else:
        surrogate = -ratio * advantage
    to_ref = min(20.0, max(-20.0, ref - logprob))
    return surrogate, math.expm1(to_ref) - to_ref, clipped


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.logaddexp.reduce(logits, -1)[..., None]


def run(function, arrays, mode, *settings):
    def call(*arrays):
        return function(*arrays, *settings)

    return [each.asnumpy() for each in (ms.jit(call) if mode == "graph" else call)(*map(Tensor, arrays))]


@MODES
@pytest.mark.parametrize("kl_factor", [0.0, 0.001, 1.0])
def test_every_side_of_the_clip_has_its_value_and_slope(mode, kl_factor):
    random = np.random.default_rng(0)
    # All sides of both clips, for both signs of the advantage and none, and beyond what exponentials can hold.
    ratios = np.array([0.0, -0.1, 0.1, -0.5, 0.5, -3, 3, -19, 19, -21, 21, -1e4, 1e4])
    d, a, e = (each.ravel() for each in np.meshgrid(ratios, [-1.5, 0.0, 2.0], ratios))
    logits = random.normal(0, 2, (d.size, 9)).astype(np.float32)
    labels = random.integers(0, 9, d.size).astype(np.int32)
    weights = random.uniform(0, 2, d.size).astype(np.float32)
    weights[::7] = 0
    rows = np.arange(d.size)
    logprobs = log_softmax(logits)[rows, labels]
    old, ref = (logprobs - d).astype(np.float32), (logprobs + e).astype(np.float32)
    surrogate, k3, clipped, entropy, dlogits = run(
        policy_loss, (logits, labels, weights, a.astype(np.float32), old, ref), mode, CLIP_LOW, CLIP_HIGH, kl_factor)

    wanted = np.array([loss_of_label(*each) for each in zip(logprobs, a, old, ref, strict=True)])
    np.testing.assert_allclose(surrogate, wanted[:, 0], rtol=RTOL, atol=1e-12)
    np.testing.assert_allclose(k3, wanted[:, 1], rtol=RTOL, atol=1e-6)  # e^x - 1 - x cancels at 0
    np.testing.assert_array_equal(clipped, wanted[:, 2])
    assert wanted[:, 2].any() and not wanted[a == 0, 2].any()
    probs = np.exp(log_softmax(logits))
    np.testing.assert_allclose(entropy, -(probs * np.log(probs)).sum(-1), rtol=RTOL)

    # The slope in the label's log-probability, by differences of the formulas, times onehot - softmax.
    step = 1e-6
    slopes = np.zeros(d.size)
    for n in rows:
        high, low = (loss_of_label(logprobs[n] + move, a[n], old[n], ref[n]) for move in (step, -step))
        slopes[n] = (high[0] + kl_factor * high[1] - low[0] - kl_factor * low[1]) / (2 * step)
    onehot = np.eye(9)[labels]
    gradient = (weights * slopes)[:, None] * (onehot - probs)
    size = weights * (np.abs(wanted[:, 0]) + kl_factor * (wanted[:, 1] + np.abs(e) + 1))
    assert (np.abs(dlogits - gradient) <= 2 * RTOL * size[:, None] + 1e-9).all()
    assert not dlogits[weights == 0].any() and np.isfinite(dlogits).all()


@MODES
def test_at_the_sampling_policy_the_gradient_is_reinforce(mode):
    """With ratio 1 and the reference equal to the policy: -advantage * d log p, and no divergence (2402.03300, 3)."""
    random = np.random.default_rng(1)
    logits = random.normal(0, 2, (20, 30)).astype(np.float32)
    labels, advantages = random.integers(0, 30, 20).astype(np.int32), random.normal(0, 1, 20).astype(np.float32)
    logprobs = log_softmax(logits)[np.arange(20), labels].astype(np.float32)
    ones = np.ones(20, np.float32)
    surrogate, k3, clipped, _, dlogits = run(policy_loss, (logits, labels, ones, advantages, logprobs, logprobs), mode,
                                             CLIP_LOW, CLIP_HIGH, 0.5)
    np.testing.assert_allclose(surrogate, -advantages, rtol=RTOL)
    assert np.abs(k3).max() < 1e-6 and not clipped.any()
    wanted = -advantages[:, None] * (np.eye(30)[labels] - np.exp(log_softmax(logits)))
    np.testing.assert_allclose(dlogits, wanted, rtol=0, atol=RTOL)


def test_k3_averages_over_the_policys_tokens_to_its_divergence_from_the_reference():
    """E_policy[k3] = KL(policy || reference), http://joschu.net/blog/kl-approx.html."""
    random = np.random.default_rng(2)
    policy, reference = log_softmax(random.normal(0, 1.5, (2, 12)))
    labels = np.arange(12, dtype=np.int32)
    logits = np.tile(policy, (12, 1)).astype(np.float32)
    zeros = np.zeros(12, np.float32)
    _, k3, _, _, _ = run(policy_loss, (logits, labels, zeros + 1, zeros, policy.astype(np.float32),
                                       reference.astype(np.float32)), "eager", CLIP_LOW, CLIP_HIGH, 1.0)
    probs = np.exp(policy)
    assert math.isclose((probs * k3).sum(), (probs * (policy - reference)).sum(), rel_tol=RTOL)
    assert (k3 >= 0).all()


@MODES
def test_label_logprobs_are_those_of_the_softmax(mode):
    random = np.random.default_rng(3)
    logits = random.normal(0, 3, (40, 25)).astype(np.float32)
    labels = random.integers(0, 25, 40).astype(np.int32)
    labels[::2] = logits.argmax(-1)[::2]
    logits[0], labels[:2] = 7, 0  # all equal: the first is the largest
    logits[1] = 7
    labels[1] = 4
    logprobs, entropies, is_top = run(label_logprobs, (logits, labels), mode)
    wanted = log_softmax(logits)
    np.testing.assert_allclose(logprobs, wanted[np.arange(40), labels], rtol=0, atol=RTOL)
    np.testing.assert_allclose(entropies, -(np.exp(wanted) * wanted).sum(-1), rtol=RTOL)
    np.testing.assert_array_equal(is_top, logits.argmax(-1) == labels)
    assert is_top[0] == 1 and is_top[1] == 0 and 0 < is_top.sum() < 40
