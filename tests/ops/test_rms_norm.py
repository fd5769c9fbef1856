"""RMSNorm against float64 and torch's gradients in double precision."""

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor

from mindpangu.ops.rms_norm import rms_norm

pytestmark = pytest.mark.usefixtures("mindspore_cpu")


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_value_and_gradients_match_double_precision(mode):
    random = np.random.default_rng(0)
    x = random.normal(0, 2, (4, 7, 33)).astype(np.float32)
    x[0] *= 1e-3  # mean square 4e-6, below eps
    x[1, 0] = 0
    weight = random.normal(1, 1, 33).astype(np.float32)
    direction = random.normal(0, 1, x.shape).astype(np.float32)

    def loss(x, weight, direction):
        out = rms_norm(x, weight, 1e-5)
        return (out * direction).sum(), out

    value_and_grad = ms.value_and_grad(loss, (0, 1), has_aux=True)

    def run(x, weight, direction):
        return value_and_grad(x, weight, direction)

    (_, out), gradients = (ms.jit(run) if mode == "graph" else run)(Tensor(x), Tensor(weight), Tensor(direction))
    x64, weight64 = (torch.tensor(array, dtype=torch.float64, requires_grad=True) for array in (x, weight))
    expected = x64 / (x64.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight64
    (expected * torch.tensor(direction)).sum().backward()
    np.testing.assert_allclose(out.asnumpy(), expected.detach().numpy(), rtol=2e-6, atol=1e-7)
    for gradient, reference in zip(gradients, (x64.grad, weight64.grad), strict=True):
        # The x gradient is a difference of terms of the size of 1 / rms: judged row by row against its largest entry.
        scale = reference.abs().amax(-1, keepdim=True).numpy()
        assert (np.abs(gradient.asnumpy() - reference.numpy()) <= 5e-6 * scale).all()


def test_statistics_of_float16_are_float32():
    x = np.full((1, 8), 3e3, np.float16)  # its square overflows float16
    out = rms_norm(Tensor(x), Tensor(np.ones(8, np.float16)), 1e-5)
    assert out.dtype == ms.float16 and np.array_equal(out.asnumpy(), np.ones((1, 8)))
