"""RMSNorm against float64 and torch's gradients in double precision."""

import mindspore as ms
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mindspore import Tensor

from mindpangu.ops.rms_norm import rms_norm

pytestmark = pytest.mark.usefixtures("kernel")


def run(mode, x, weight, direction, dtype=ms.float32, weight_dtype=ms.float32, eps=1e-5):
    """Value and the gradients of sum(value * direction), as float32 arrays."""

    def loss(x, weight, direction):
        out = rms_norm(x, weight, eps)
        return (ms.ops.cast(out, ms.float32) * direction).sum(), out

    value_and_grad = ms.value_and_grad(loss, (0, 1), has_aux=True)

    def both(x, weight, direction):
        return value_and_grad(x, weight, direction)

    (_, out), gradients = (ms.jit(both) if mode == "graph" else both)(
        Tensor(x, dtype), Tensor(weight, weight_dtype), Tensor(direction))
    assert out.dtype == gradients[0].dtype == dtype and gradients[1].dtype == weight_dtype
    return [array.astype(ms.float32).asnumpy() for array in (out, *gradients)]


def expected(x, weight, direction, eps=1e-5):
    x64, weight64 = (torch.tensor(array, dtype=torch.float64, requires_grad=True) for array in (x, weight))
    out = x64 / (x64.square().mean(-1, keepdim=True) + eps).sqrt() * weight64
    (out * torch.tensor(direction)).sum().backward()
    return out.detach().numpy(), x64.grad.numpy(), weight64.grad.numpy()


def rounded(array):
    """What bfloat16 keeps of float32 numbers."""
    return torch.tensor(array).bfloat16().float().numpy()


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_value_and_gradients_match_double_precision(mode):
    random = np.random.default_rng(0)
    x = random.normal(0, 2, (4, 7, 33)).astype(np.float32)
    x[0] *= 1e-3  # mean square 4e-6, below eps
    x[1, 0] = 0
    x[2] *= 1e9
    weight = random.normal(1, 1, 33).astype(np.float32)
    direction = random.normal(0, 1, x.shape).astype(np.float32)
    out, *gradients = run(mode, x, weight, direction)
    expected_out, *expected_gradients = expected(x, weight, direction)
    np.testing.assert_allclose(out, expected_out, rtol=2e-6, atol=1e-7)
    for gradient, reference in zip(gradients, expected_gradients, strict=True):
        # The x gradient is a difference of terms of the size of 1 / rms: judged row by row against its largest entry.
        scale = np.abs(reference).max(-1, keepdims=True)
        assert (np.abs(gradient - reference) <= 5e-6 * scale).all()


@pytest.mark.parametrize("dtype", [ms.float32, ms.bfloat16])
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 70), size=st.integers(1, 150), spread=st.sampled_from([1e-3, 1, 1e4]),
       seed=st.integers(0, 99))
def test_any_shape_matches_double_precision(kernel, dtype, rows, size, spread, seed):
    if kernel == "reference" and dtype == ms.bfloat16:
        return  # MindSpore's CPU backend has no bfloat16 sum, which the weight's gradient is
    random = np.random.default_rng(seed)
    x = random.normal(0, spread, (rows, size)).astype(np.float32)
    weight, direction = (random.normal(0, 1, shape).astype(np.float32) for shape in (size, x.shape))
    if dtype == ms.bfloat16:
        x, weight, direction = rounded(x), rounded(weight), rounded(direction)
    outputs = run("eager", x, weight, direction, dtype, dtype)
    # A bfloat16 has 8 bits. Gradients are sums of terms, judged by the size of the largest.
    tolerance = 2**-8 if dtype == ms.bfloat16 else 1e-5
    for output, reference in zip(outputs, expected(x, weight, direction), strict=True):
        largest = np.abs(direction).max() * np.abs(weight).max() / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5)
        scale = np.abs(reference) + (largest if output.shape == x.shape else np.abs(reference).max() + rows**0.5)
        assert (np.abs(output - reference) <= tolerance * scale).all()


def test_bfloat16_activations_may_have_a_float32_weight(kernel):
    if kernel == "reference":
        pytest.skip("the reference multiplies in the activations' dtype")
    random = np.random.default_rng(1)
    x, direction = (rounded(random.normal(0, 1, (5, 24)).astype(np.float32)) for _ in range(2))
    weight = random.normal(0, 1, 24).astype(np.float32)
    _, _, gradient = run("graph", x, weight, direction, ms.bfloat16, ms.float32)
    np.testing.assert_allclose(gradient, expected(x, weight, direction)[2], rtol=1e-5, atol=1e-5)


def test_views_count_by_what_they_show():
    random = np.random.default_rng(2)
    x = random.normal(0, 1, (10, 6, 8)).astype(np.float32)
    weight = random.normal(0, 1, 6).astype(np.float32)
    for view, array in ((Tensor(x).transpose(2, 0, 1), x.transpose(2, 0, 1)), (Tensor(x)[:, :, 2:8], x[:, :, 2:8])):
        out = rms_norm(view, Tensor(weight), 1e-5).asnumpy()
        np.testing.assert_allclose(out, expected(array, weight, array)[0], rtol=2e-6, atol=1e-7)


def test_gradients_do_not_depend_on_the_number_of_threads(cpu_library):
    random = np.random.default_rng(3)
    x, direction = (random.normal(0, 1, (1000, 300)).astype(np.float32) for _ in range(2))
    weight = random.normal(0, 1, 300).astype(np.float32)
    runs = []
    for threads in (1, 2, 3, 5):
        cpu_library.pangu_set_num_threads(threads)
        runs.append(run("eager", x, weight, direction))
    cpu_library.pangu_set_num_threads(2)
    for outputs in runs[1:]:
        assert all(np.array_equal(output, first) for output, first in zip(outputs, runs[0], strict=True))


def test_a_wrong_dtype_and_shape_name_op_argument_and_expectation(kernel):
    if kernel == "reference":
        pytest.skip("the reference takes what MindSpore's primitives take")
    x = Tensor(np.ones((2, 8), np.float64))
    with pytest.raises(RuntimeError, match="RmsNorm on CPU: x is float64: expected float32 or bfloat16"):
        rms_norm(x, Tensor(np.ones(8, np.float32)), 1e-5).asnumpy()


def test_statistics_of_float16_are_float32(kernel):
    if kernel == "native":
        pytest.skip("the CPU kernel takes float32 and bfloat16")
    x = np.full((1, 8), 3e3, np.float16)  # its square overflows float16
    out = rms_norm(Tensor(x), Tensor(np.ones(8, np.float16)), 1e-5)
    assert out.dtype == ms.float16 and np.array_equal(out.asnumpy(), np.ones((1, 8)))
