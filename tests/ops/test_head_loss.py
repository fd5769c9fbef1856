"""The chunked head: against itself unchunked is not enough, so against torch autograd in double precision too."""

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor

from mindpangu.ops.cross_entropy import cross_entropy
from mindpangu.ops.head_loss import HeadLoss

pytestmark = pytest.mark.usefixtures("mindspore_cpu")


def weighted_cross_entropy(logits_NV, labels_N, weights_N):
    ce_N, dlogits_NV = cross_entropy(logits_NV, labels_N, weights_N)
    loss = (ce_N * weights_N).sum()
    return loss, ms.ops.stack((loss, weights_N.sum())), dlogits_NV


def case():
    random = np.random.default_rng(0)
    return (random.normal(0, 1, (11, 8)).astype(np.float32), random.normal(0, 1, (20, 8)).astype(np.float32),
            random.integers(0, 20, 11).astype(np.int32), random.uniform(0, 2, 11).astype(np.float32))


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("chunk_size", [1, 4, 11, 100])
def test_loss_and_gradients_match_double_precision_whatever_the_chunks(mode, chunk_size):
    hidden, weight, labels, weights = case()
    head_loss = HeadLoss(weighted_cross_entropy, 2, chunk_size)

    def loss(hidden, weight, labels, weights, scale):
        # Used twice and scaled, as under gradient accumulation: bprop's scalar is neither 1 nor the only path.
        loss_sum, metrics, _, _ = head_loss(hidden * 2.0, weight, (labels, weights))
        return scale * loss_sum + (hidden * weight[:11]).sum(), metrics

    value_and_grad = ms.value_and_grad(loss, (0, 1), has_aux=True)

    def run(*inputs):
        return value_and_grad(*inputs)

    inputs = [Tensor(array) for array in (hidden, weight, labels, weights, np.float32(-0.7))]
    (value, metrics), gradients = (ms.jit(run) if mode == "graph" else run)(*inputs)
    h, w = (torch.tensor(array, dtype=torch.float64, requires_grad=True) for array in (hidden, weight))
    ce = torch.nn.functional.cross_entropy(2 * h @ w.T, torch.tensor(labels, dtype=torch.long), reduction="none")
    expected = (ce * torch.tensor(weights)).sum()
    (-0.7 * expected + (h * w[:11]).sum()).backward()
    # MindSpore's exp on CPU has a relative error of up to 5e-6.
    np.testing.assert_allclose(metrics.asnumpy(), [expected.item(), weights.sum()], rtol=5e-6)
    np.testing.assert_allclose(value.asnumpy(), -0.7 * expected.item() + (hidden * weight[:11]).sum(), rtol=5e-6)
    for gradient, tensor in zip(gradients, (h, w), strict=True):
        assert np.abs(gradient.asnumpy() - tensor.grad.numpy()).max() <= 1e-5 * tensor.grad.abs().max()


def test_targets_may_have_further_axes():
    hidden, weight, _, _ = case()
    targets = np.random.default_rng(1).normal(0, 1, (11, 3, 2)).astype(np.float32)

    def linear(logits_NV, targets_N32):
        coefficients = targets_N32.reshape(-1, 6)
        loss = (logits_NV[:, :6] * coefficients).sum()
        return loss, loss.reshape(1), ms.ops.pad(coefficients, (0, 14))

    loss_sum, metrics, d_hidden, d_weight = HeadLoss(linear, 1, 4)(
        Tensor(hidden), Tensor(weight), (Tensor(targets),))
    coefficients = np.pad(targets.reshape(11, 6), ((0, 0), (0, 14))).astype(np.float64)
    np.testing.assert_allclose(loss_sum.asnumpy(), (hidden @ weight.T * coefficients).sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics.asnumpy()[0], loss_sum.asnumpy(), rtol=1e-6)
    np.testing.assert_allclose(d_hidden.asnumpy(), coefficients @ weight, rtol=0, atol=1e-5)
    np.testing.assert_allclose(d_weight.asnumpy(), coefficients.T @ hidden, rtol=0, atol=1e-5)
