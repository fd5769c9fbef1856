"""SwiGLU against float64 and torch's gradients in double precision."""

import mindspore as ms
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mindspore import Tensor

from mindpangu.ops.swiglu import swiglu

pytestmark = pytest.mark.usefixtures("kernel")


def run(mode, gate_up, direction, dtype=ms.float32):
    """Value and the gradient of sum(value * direction), as float32 arrays."""

    def loss(gate_up, direction):
        out = swiglu(gate_up)
        return (ms.ops.cast(out, ms.float32) * direction).sum(), out

    value_and_grad = ms.value_and_grad(loss, 0, has_aux=True)

    def both(gate_up, direction):
        return value_and_grad(gate_up, direction)

    (_, out), gradient = (ms.jit(both) if mode == "graph" else both)(Tensor(gate_up, dtype), Tensor(direction))
    assert out.dtype == gradient.dtype == dtype
    return out.astype(ms.float32).asnumpy(), gradient.astype(ms.float32).asnumpy()


def expected(gate_up, direction):
    double = torch.tensor(gate_up, dtype=torch.float64, requires_grad=True)
    gate, up = double.chunk(2, -1)
    out = torch.nn.functional.silu(gate) * up
    (out * torch.tensor(direction)).sum().backward()
    return out.detach().numpy(), double.grad.numpy()


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_value_and_gradient_match_double_precision(mode):
    random = np.random.default_rng(0)
    gate_up = random.normal(0, 3, (5, 26)).astype(np.float32)
    gate_up[0, :6] = [-200, -90, -30, 0, 30, 200]  # exp(200) overflows float32
    gate_up[1, :2] = [-1e30, 1e30]
    gate_up[1, 13:15] = 1
    direction = random.normal(0, 1, (5, 13)).astype(np.float32)
    out, gradient = run(mode, gate_up, direction)
    expected_out, expected_gradient = expected(gate_up, direction)
    np.testing.assert_allclose(out, expected_out, rtol=2e-6, atol=1e-12)
    # silu' = s (1 + x (1 - s)) cancels near its zero at -1.28, where it is off by some roundings of its terms.
    np.testing.assert_allclose(gradient, expected_gradient, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [ms.float32, ms.bfloat16])
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 20), size=st.integers(1, 100), axes=st.integers(1, 2), seed=st.integers(0, 99))
def test_any_shape_matches_double_precision(kernel, dtype, rows, size, axes, seed):
    if kernel == "reference" and dtype == ms.bfloat16:
        return  # MindSpore's CPU backend has no bfloat16 sigmoid
    random = np.random.default_rng(seed)
    gate_up = random.normal(0, 3, (rows,) * axes + (2 * size,)).astype(np.float32)
    direction = random.normal(0, 1, gate_up.shape[:-1] + (size,)).astype(np.float32)
    if dtype == ms.bfloat16:
        gate_up, direction = (torch.tensor(array).bfloat16().float().numpy() for array in (gate_up, direction))
    tolerance = 2**-8 if dtype == ms.bfloat16 else 5e-6  # a bfloat16 has 8 bits
    for output, reference in zip(run("eager", gate_up, direction, dtype), expected(gate_up, direction), strict=True):
        np.testing.assert_allclose(output, reference, rtol=tolerance, atol=1e-5)


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_no_tokens_give_no_tokens(mode):
    out, gradient = run(mode, np.zeros((0, 10), np.float32), np.zeros((0, 5), np.float32))
    assert out.shape == (0, 5) and gradient.shape == (0, 10)


def test_views_count_by_what_they_show():
    x = np.random.default_rng(1).normal(0, 1, (8, 6, 10)).astype(np.float32)
    for view, array in ((Tensor(x).transpose(2, 1, 0), x.transpose(2, 1, 0)), (Tensor(x)[:, 1:, 2:], x[:, 1:, 2:])):
        np.testing.assert_allclose(swiglu(view).asnumpy(), expected(array, 1.0)[0], rtol=2e-6, atol=1e-7)


def test_a_wrong_dtype_names_op_argument_and_expectation(kernel):
    if kernel == "reference":
        pytest.skip("the reference takes what MindSpore's primitives take")
    with pytest.raises(RuntimeError, match="Swiglu on CPU: gate_up is float64: expected float32 or bfloat16"):
        swiglu(Tensor(np.ones((2, 8)))).asnumpy()
