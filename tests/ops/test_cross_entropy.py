"""Cross-entropy and its gradient against torch in double precision."""

import mindspore as ms
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mindspore import Tensor

from mindpangu.ops.cross_entropy import cross_entropy

pytestmark = pytest.mark.usefixtures("kernel")


def run(mode, logits, labels, weights, dtype=ms.float32):
    op = ms.jit(cross_entropy) if mode == "graph" else cross_entropy
    outputs = op(Tensor(logits, dtype), Tensor(labels), Tensor(weights))
    return [ms.ops.cast(output, ms.float32).asnumpy() for output in outputs]


def expected(logits, labels, weights):
    double = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    ce = torch.nn.functional.cross_entropy(double, torch.tensor(labels, dtype=torch.long), reduction="none")
    (ce * torch.tensor(weights)).sum().backward()
    return ce.detach().numpy(), double.grad.numpy()


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_value_and_gradient_match_double_precision(mode):
    random = np.random.default_rng(0)
    logits = random.normal(0, 3, (6, 41)).astype(np.float32)
    logits[1] += 1e4  # exp would overflow
    logits[2, 5] = 200  # a certain token
    labels = np.array([0, 7, 5, 40, 3, 3], np.int32)
    weights = np.array([1, 0.5, 2, 0, 1, -1], np.float32)
    ce, dlogits = run(mode, logits, labels, weights)
    expected_ce, expected_dlogits = expected(logits, labels, weights)
    # Row 1 holds numbers of 1e4, whose float32 spacing is 1e-3; the other rows' errors are those of sums below 20.
    tolerance = np.where(np.arange(6) == 1, 1e-3, 3e-6)
    assert (np.abs(ce - expected_ce) <= tolerance).all()
    assert (np.abs(dlogits - expected_dlogits) <= tolerance[:, None]).all()
    assert not dlogits[3].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(num_positions=st.integers(1, 9), vocab_size=st.integers(1, 2100), spread=st.sampled_from([0.1, 3, 30]),
       seed=st.integers(0, 99))
def test_any_vocabulary_matches_double_precision(dtype, num_positions, vocab_size, spread, seed):
    random = np.random.default_rng(seed)
    logits = random.normal(0, spread, (num_positions, vocab_size)).astype(np.float32)
    if dtype == "bfloat16":
        logits = torch.tensor(logits).bfloat16().float().numpy()
    if vocab_size > 1:
        logits[0, random.integers(vocab_size)] = -np.inf  # a token that cannot be
    labels = logits.argmax(-1).astype(np.int32)
    weights = random.uniform(-1, 1, num_positions).astype(np.float32)
    ce, dlogits = run("eager", logits, labels, weights, getattr(ms, dtype))
    expected_ce, expected_dlogits = expected(logits, labels, weights)
    # MindSpore's exp has a relative error of 5e-6; logits up to 100 have a spacing of 8e-6.
    np.testing.assert_allclose(ce, expected_ce, rtol=1e-5, atol=2e-5)
    # A bfloat16 gradient is rounded once: half of 2^-7 of its value.
    rounding = 2**-8 if dtype == "bfloat16" else 0
    np.testing.assert_allclose(dlogits, expected_dlogits, rtol=rounding, atol=2e-5)


def test_a_label_outside_the_vocabulary_is_an_error_of_the_native_kernel(kernel):
    if kernel == "native":
        with pytest.raises(RuntimeError, match="CrossEntropy on CPU: labels is 5: expected a token from 0 to 4"):
            run("eager", np.zeros((2, 5), np.float32), np.array([0, 5], np.int32), np.ones(2, np.float32))
