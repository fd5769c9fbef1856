"""Rotary embedding against complex multiplication in float64, and against transformers' tables."""

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mindpangu.ops.rope import inverse_frequencies, rope, rope_tables

pytestmark = pytest.mark.usefixtures("mindspore_cpu")


def rotate(x_TNH, positions_T, theta):
    """Each pair (x[i], x[i + H/2]) as a complex number times exp(i * position * theta^(-2i/H)), in float64."""
    half = x_TNH.shape[-1] // 2
    angles = positions_T[:, None].astype(np.float64) * theta ** (-np.arange(half) / half)
    turned = (x_TNH[..., :half] + 1j * x_TNH[..., half:]) * np.exp(1j * angles)[:, None]
    return np.concatenate([turned.real, turned.imag], -1)


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_value_and_gradient_match_double_precision(mode):
    random = np.random.default_rng(0)
    x = random.normal(0, 1, (6, 3, 10)).astype(np.float32)
    positions = np.array([0, 1, 2, 0, 7, 100], np.int32)
    direction = random.normal(0, 1, x.shape).astype(np.float32)
    frequencies = Tensor(inverse_frequencies(10, 1e4))

    def loss(x, positions, direction):
        out = rope(x, *rope_tables(positions, frequencies, ms.float32))
        return (out * direction).sum(), out

    value_and_grad = ms.value_and_grad(loss, 0, has_aux=True)

    def run(x, positions, direction):
        return value_and_grad(x, positions, direction)

    (_, out), gradient = (ms.jit(run) if mode == "graph" else run)(Tensor(x), Tensor(positions), Tensor(direction))
    # An angle of 100 rad has a float32 rounding of 4e-6.
    np.testing.assert_allclose(out.asnumpy(), rotate(x, positions, 1e4), rtol=0, atol=2e-5)
    # The transpose of a rotation is the rotation back.
    np.testing.assert_allclose(gradient.asnumpy(), rotate(direction, -positions, 1e4), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("head_dim", "theta"), [(128, 4e6), (128, 16e6), (32, 1e4)])
def test_tables_are_those_of_transformers_up_to_the_longest_position(head_dim, theta):
    positions = np.array([0, 1, 4095, 32767], np.int32)
    cos, sin = rope_tables(Tensor(positions), Tensor(inverse_frequencies(head_dim, theta)), ms.float32)
    config = LlamaConfig(hidden_size=head_dim, num_attention_heads=1, rope_theta=theta, max_position_embeddings=32768)
    tables = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.tensor(positions, dtype=torch.long)[None])
    for ours, theirs in zip((cos, sin), tables, strict=True):
        # Float32 angles: the last bit of a frequency moves an angle of 32767 rad by 4e-3.
        difference = np.abs(ours.asnumpy()[:, 0] - theirs[0].numpy())
        assert (difference <= 1e-6 + positions[:, None] * 1.2e-7).all()


def test_scores_depend_on_the_distance_only():
    random = np.random.default_rng(1)
    q, k = random.normal(0, 1, (2, 8)).astype(np.float32)
    positions = np.array([3, 10, 203, 210], np.int32)
    x = Tensor(np.stack([k, q, k, q])[:, None])
    turned = rope(x, *rope_tables(Tensor(positions), Tensor(inverse_frequencies(8, 1e4)), ms.float32)).asnumpy()[:, 0]
    assert abs(turned[0] @ turned[1] - turned[2] @ turned[3]) < 2e-4  # float32 angles of 200 rad: 1.5e-5 each
    assert abs(turned[0] @ turned[1] - k @ q) > 1e-2
