"""Rotary embedding against complex multiplication in float64, and against transformers' tables."""

import mindspore as ms
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mindspore import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mindpangu.ops.rope import inverse_frequencies, rope, rope_tables, split_rope

pytestmark = pytest.mark.usefixtures("kernel")


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


def run_split(mode, qkv, positions, directions, num_heads, num_kv_heads, dtype=ms.float32, theta=1e4):
    """q, k, v and the gradient of the sum of their products with `directions`, as float32 arrays."""
    head_dim = directions[0].shape[-1]
    frequencies = Tensor(inverse_frequencies(head_dim, theta))

    def loss(qkv, positions, dq, dk, dv):
        q, k, v = split_rope(qkv, *rope_tables(positions, frequencies, dtype), num_heads, num_kv_heads)
        total = (ms.ops.cast(q, ms.float32) * dq).sum() + (ms.ops.cast(k, ms.float32) * dk).sum()
        return total + (ms.ops.cast(v, ms.float32) * dv).sum(), q, k, v

    value_and_grad = ms.value_and_grad(loss, 0, has_aux=True)

    def both(qkv, positions, dq, dk, dv):
        return value_and_grad(qkv, positions, dq, dk, dv)

    (_, *parts), gradient = (ms.jit(both) if mode == "graph" else both)(
        Tensor(qkv, dtype), Tensor(positions), *(Tensor(direction) for direction in directions))
    assert all(tensor.dtype == dtype for tensor in (*parts, gradient))
    return [tensor.astype(ms.float32).asnumpy() for tensor in (*parts, gradient)]


def check_split(outputs, qkv, positions, directions, tolerance, theta=1e4):
    (num_tokens, num_heads, head_dim), num_kv_heads = directions[0].shape, directions[1].shape[1]
    heads = qkv.reshape(num_tokens, -1, head_dim)
    q, k, v = np.split(heads, (num_heads, num_heads + num_kv_heads), 1)
    gradients = [rotate(directions[0], -positions, theta), rotate(directions[1], -positions, theta), directions[2]]
    references = [rotate(q, positions, theta), rotate(k, positions, theta), v,
                  np.concatenate(gradients, 1).reshape(qkv.shape)]
    for output, reference in zip(outputs, references, strict=True):
        np.testing.assert_allclose(output, reference, rtol=0, atol=tolerance)


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_a_projection_is_split_and_rotated_by_the_heads_asked_for(mode):
    random = np.random.default_rng(2)
    positions = np.array([0, 1, 2, 0, 1, 50], np.int32)
    qkv = random.normal(0, 1, (6, 80)).astype(np.float32)
    for num_heads, num_kv_heads in ((4, 2), (2, 3)):  # the same sizes twice: the counts tell them apart
        directions = [random.normal(0, 1, (6, heads, 10)).astype(np.float32)
                      for heads in (num_heads, num_kv_heads, num_kv_heads)]
        outputs = run_split(mode, qkv, positions, directions, num_heads, num_kv_heads)
        check_split(outputs, qkv, positions, directions, 2e-5)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(num_tokens=st.integers(1, 40), num_kv_heads=st.integers(1, 3), group=st.integers(1, 3), half=st.integers(1, 40),
       in_bfloat16=st.booleans(), seed=st.integers(0, 99))
def test_any_shape_is_split_and_rotated(kernel, num_tokens, num_kv_heads, group, half, in_bfloat16, seed):
    if kernel == "reference" and in_bfloat16:
        return  # MindSpore's CPU backend slices no bfloat16
    random = np.random.default_rng(seed)
    counts = [num_kv_heads * group, num_kv_heads, num_kv_heads]
    positions = random.integers(0, 64, num_tokens).astype(np.int32)
    qkv, *directions = (random.normal(0, 1, shape).astype(np.float32) for shape in (
        (num_tokens, sum(counts) * 2 * half), *((num_tokens, count, 2 * half) for count in counts)))
    if in_bfloat16:
        qkv, *directions = (torch.tensor(array).bfloat16().float().numpy() for array in (qkv, *directions))
    outputs = run_split("eager", qkv, positions, directions, *counts[:2], ms.bfloat16 if in_bfloat16 else ms.float32)
    # Tables and results of 8 bits, numbers below 5.
    check_split(outputs, qkv, positions, directions, 0.06 if in_bfloat16 else 2e-5)


def test_no_tokens_give_no_tokens(kernel):
    if kernel == "reference":
        pytest.skip("MindSpore's own kernels refuse tensors without elements here")
    tables = Tensor(np.zeros((0, 1, 6), np.float32))
    q, k, v = split_rope(Tensor(np.zeros((0, 24), np.float32)), tables, tables, 2, 1)
    assert q.shape == (0, 2, 6) and k.shape == v.shape == (0, 1, 6)


def test_a_wrong_table_is_named(kernel):
    if kernel == "reference":
        pytest.skip("the reference takes what MindSpore's primitives take")
    x, table = Tensor(np.ones((4, 3, 6), np.float32)), Tensor(np.ones((4, 1, 8), np.float32))
    with pytest.raises(RuntimeError, match=r"Rope on CPU: cos is \[4, 1, 8\]: expected \[4, 1, 6\]"):
        rope(x, table, table).asnumpy()


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
