"""SwiGLU against float64 and torch's gradients in double precision."""

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor

from mindpangu.ops.swiglu import swiglu

pytestmark = pytest.mark.usefixtures("mindspore_cpu")


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_value_and_gradient_match_double_precision(mode):
    random = np.random.default_rng(0)
    gate_up = random.normal(0, 3, (5, 26)).astype(np.float32)
    gate_up[0, :6] = [-200, -90, -30, 0, 30, 200]  # exp(200) overflows float32
    direction = random.normal(0, 1, (5, 13)).astype(np.float32)

    def loss(gate_up, direction):
        out = swiglu(gate_up)
        return (out * direction).sum(), out

    value_and_grad = ms.value_and_grad(loss, 0, has_aux=True)

    def run(gate_up, direction):
        return value_and_grad(gate_up, direction)

    (_, out), gradient = (ms.jit(run) if mode == "graph" else run)(Tensor(gate_up), Tensor(direction))
    double = torch.tensor(gate_up, dtype=torch.float64, requires_grad=True)
    expected = torch.nn.functional.silu(double[:, :13]) * double[:, 13:]
    (expected * torch.tensor(direction)).sum().backward()
    np.testing.assert_allclose(out.asnumpy(), expected.detach().numpy(), rtol=2e-6, atol=1e-12)
    # silu' = s (1 + x (1 - s)) cancels near its zero at -1.28, where it is off by some roundings of its terms.
    np.testing.assert_allclose(gradient.asnumpy(), double.grad.numpy(), rtol=2e-6, atol=2e-6)
