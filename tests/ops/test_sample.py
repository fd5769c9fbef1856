"""Sampling against the exact distribution in float64."""

import mindspore as ms
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mindspore import Tensor
from scipy.stats import chisquare

from mindpangu.ops.sample import sample

pytestmark = pytest.mark.usefixtures("kernel")
LAST = np.float32(1 - 2**-23)  # the largest uniform number
LOGPROB_ERROR = 6e-6  # MindSpore's exp on CPU has a relative error of up to 5e-6, float32 sums of 50 terms add 1e-6
SETTINGS = [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 5, 1.0), (1.0, 0, 0.8), (0.7, 6, 0.9), (1.0, 100, 1.0), (1.0, 0, 1e-6)]


def full_logprobs(logits_V, temperature):
    """Log-softmax [V] by the definition, in float64."""
    scaled = logits_V.astype(np.float64) / temperature
    return scaled - scaled.max() - np.log(np.exp(scaled - scaled.max()).sum())


def kept_distribution(logits_V, temperature, top_k, top_p):
    """Probabilities [V] within the kept set by the definition, in float64."""
    scaled = logits_V.astype(np.float64) / temperature
    order = np.argsort(-scaled)
    if top_k > 0:
        order = order[:top_k]
    probs = np.exp(scaled[order] - scaled.max())
    probs /= probs.sum()
    num_kept = int(np.searchsorted(np.cumsum(probs), top_p)) + 1 if top_p < 1 else len(order)
    kept = np.zeros(logits_V.size)
    kept[order[:num_kept]] = probs[:num_kept] / probs[:num_kept].sum()
    return kept


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS)
def test_frequencies_and_logprobs_are_those_of_the_exact_distribution(temperature, top_k, top_p):
    logits = np.random.default_rng(3).normal(0, 1.5, 12).astype(np.float32)
    num_draws = 20000
    uniforms = np.random.default_rng(4).random(num_draws, np.float32) * LAST
    tokens, logprobs, kept_logprobs = (out.asnumpy() for out in sample(
        Tensor(np.tile(logits, (num_draws, 1))), Tensor(uniforms), temperature, top_k, top_p))
    expected = kept_distribution(logits, temperature, top_k, top_p)
    counts = np.bincount(tokens, minlength=12)
    kept = expected > 0
    assert tokens.dtype == np.int32 and not counts[~kept].any()
    rare = expected * num_draws < 5  # too few for the chi-square distribution: taken together
    observed, wanted = (np.append(array[~rare], array[rare].sum()) for array in (counts, expected * num_draws))
    wanted, observed = wanted[wanted > 0], observed[wanted > 0]
    # One fixed seed per setting: a right sampler fails with probability 1e-3, once for all.
    assert wanted.size == 1 or chisquare(observed, wanted).pvalue > 1e-3
    np.testing.assert_allclose(logprobs, np.log(expected[tokens]), rtol=0, atol=LOGPROB_ERROR)
    mass = np.exp(full_logprobs(logits, temperature))[kept].sum()
    np.testing.assert_allclose(kept_logprobs, np.log(mass), rtol=0, atol=LOGPROB_ERROR)
    assert kept_logprobs.dtype == np.float32 and (not kept.all() or not kept_logprobs.any())


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(vocab_size=st.integers(1, 700), temperature=st.sampled_from([0.3, 0.7, 1.0, 1.3, 3.0]),
       top_k=st.sampled_from([0, 1, 5, 20, 700, 5000]), top_p=st.sampled_from([0.01, 0.5, 0.9, 0.999, 1.0]),
       spread=st.sampled_from([0.0, 0.5, 4.0, 30.0]), seed=st.integers(0, 99))
def test_with_the_kept_mass_the_logprob_is_that_of_the_whole_softmax(vocab_size, temperature, top_k, top_p, spread,
                                                                     seed):
    random = np.random.default_rng(seed)
    logits = random.normal(0, spread, (4, vocab_size)).astype(np.float32)
    uniforms = random.random(4, np.float32) * LAST
    tokens, logprobs, kept_logprobs = (out.asnumpy() for out in sample(Tensor(logits), Tensor(uniforms), temperature,
                                                                       top_k, top_p))
    wanted = [full_logprobs(row, temperature)[token] for row, token in zip(logits, tokens, strict=True)]
    # Scaled logits of 300 are known to 2^-16 in float32.
    scaled = np.abs(logits).max() / temperature
    np.testing.assert_allclose(logprobs + kept_logprobs, wanted, rtol=0, atol=2 * LOGPROB_ERROR + 2**-23 * scaled)
    assert (kept_logprobs <= 0).all() and (logprobs <= 2**-20).all()
    if top_p == 1 and (top_k == 0 or top_k >= vocab_size):
        assert not kept_logprobs.any()
    elif top_p == 1 and spread == 0:
        np.testing.assert_allclose(kept_logprobs, np.log(top_k / vocab_size), rtol=0, atol=LOGPROB_ERROR)


def test_the_number_runs_through_the_distribution():
    # Without sorting the tokens own consecutive intervals of [0, 1), so that each uniform number has one right answer.
    logits = np.log(np.array([0.25, 0.125, 0.5, 0.125], np.float32))
    uniforms = np.array([0, 0.2, 0.26, 0.37, 0.38, 0.8, 0.88, LAST], np.float32)
    tokens, _, _ = sample(Tensor(np.tile(logits, (8, 1))), Tensor(uniforms))
    assert tokens.asnumpy().tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS)
def test_the_ends_of_the_interval_give_possible_tokens(temperature, top_k, top_p):
    logits = np.random.default_rng(5).normal(0, 3, (64, 40)).astype(np.float32)
    logits[:, :3] = logits[:, -3:] = -1e4  # impossible tokens at both ends
    for uniform in (0, LAST):
        tokens, logprobs, kept = sample(Tensor(logits), Tensor(np.full(64, uniform, np.float32)), temperature, top_k,
                                        top_p)
        tokens = tokens.asnumpy()
        assert ((tokens >= 3) & (tokens < 37)).all() and ((logprobs + kept).asnumpy() > -50).all()


def test_greedy_takes_the_most_likely_token_at_temperature_one():
    logits = np.random.default_rng(6).normal(0, 2, (9, 30)).astype(np.float32)
    tokens, logprobs, kept = (out.asnumpy() for out in sample(Tensor(logits), Tensor(np.zeros(9, np.float32)), 0, 3))
    assert not kept.any() and np.array_equal(tokens, logits.argmax(-1)) and tokens.dtype == np.int32
    expected = [np.log(kept_distribution(row, 1.0, 0, 1.0).max()) for row in logits]
    np.testing.assert_allclose(logprobs, expected, rtol=0, atol=LOGPROB_ERROR)


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(0, 0, 1.0), (1.0, 0, 1.0), (0.8, 7, 0.9)])
def test_a_token_depends_on_its_own_row_only(temperature, top_k, top_p):
    random = np.random.default_rng(7)
    logits = random.normal(0, 2, (8, 50)).astype(np.float32)
    uniforms = random.random(8, np.float32)
    together = [out.asnumpy() for out in sample(Tensor(logits), Tensor(uniforms), temperature, top_k, top_p)]
    for row in range(8):
        alone = sample(Tensor(logits[row:row + 1]), Tensor(uniforms[row:row + 1]), temperature, top_k, top_p)
        for a, b in zip(alone, together, strict=True):
            assert a.asnumpy()[0] == b[row]


def test_a_compiled_graph_draws_the_same_tokens():
    logits, uniforms = np.random.default_rng(8).normal(0, 2, (16, 20)).astype(np.float32), np.linspace(0, LAST, 16)

    def draw(logits, uniforms):
        return sample(logits, uniforms, 0.8, 7, 0.9)

    inputs = Tensor(logits), Tensor(uniforms.astype(np.float32))
    compiled, eager = (np.stack([out.asnumpy() for out in program(*inputs)]) for program in (ms.jit(draw), draw))
    assert np.array_equal(compiled[0], eager[0]) and (compiled[2] < -0.05).all()
    np.testing.assert_allclose(compiled[1:], eager[1:], rtol=0, atol=1e-6)


def test_a_vocabulary_of_153376_is_inverted_to_the_last_token(kernel):
    """Float32 sums over so many tokens lose the far tail: the native kernel adds blocks in float64."""
    if kernel == "reference":
        pytest.skip("its cumulative sum is float32: a token may be off by a few in the tail")
    logits = np.random.default_rng(9).normal(0, 3, 153376).astype(np.float32)
    uniforms = np.linspace(0, LAST, 200, dtype=np.float32)
    tokens, logprobs, _ = (out.asnumpy() for out in sample(Tensor(np.tile(logits, (200, 1))), Tensor(uniforms)))
    cumulative = np.cumsum(np.exp(logits.astype(np.float64) - logits.max()))
    cumulative /= cumulative[-1]
    # A token owns an interval; the sums of 256 probabilities in float32 move its ends by at most 1e-7.
    assert (cumulative[tokens] > uniforms - 1e-7).all()
    assert (np.append(0, cumulative)[tokens] <= uniforms + 1e-7).all()
    expected = logits[tokens] - np.log(np.exp(logits.astype(np.float64)).sum())
    np.testing.assert_allclose(logprobs, expected, rtol=2e-7, atol=2e-7)  # float32 holds 24 bits
