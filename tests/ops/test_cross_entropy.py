"""Cross-entropy and its gradient against torch in double precision."""

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor

from mindpangu.ops.cross_entropy import cross_entropy

pytestmark = pytest.mark.usefixtures("mindspore_cpu")


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_value_and_gradient_match_double_precision(mode):
    random = np.random.default_rng(0)
    logits = random.normal(0, 3, (6, 41)).astype(np.float32)
    logits[1] += 1e4  # exp would overflow
    logits[2, 5] = 200  # a certain token
    labels = np.array([0, 7, 5, 40, 3, 3], np.int32)
    weights = np.array([1, 0.5, 2, 0, 1, -1], np.float32)
    run = ms.jit(cross_entropy) if mode == "graph" else cross_entropy
    ce, dlogits = (out.asnumpy() for out in run(Tensor(logits), Tensor(labels), Tensor(weights)))
    double = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    expected = torch.nn.functional.cross_entropy(double, torch.tensor(labels, dtype=torch.long), reduction="none")
    (expected * torch.tensor(weights)).sum().backward()
    # Row 1 holds numbers of 1e4, whose float32 spacing is 1e-3; the other rows' errors are those of sums below 20.
    tolerance = np.where(np.arange(6) == 1, 1e-3, 3e-6)
    assert (np.abs(ce - expected.detach().numpy()) <= tolerance).all()
    assert (np.abs(dlogits - double.grad.numpy()) <= tolerance[:, None]).all()
    assert not dlogits[3].any()
