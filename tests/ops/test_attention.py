"""Attention against float64, document by document and position by position."""

import mindspore as ms
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mindspore import Tensor

from mindpangu.ops.attention import attention, cached_attention

pytestmark = pytest.mark.usefixtures("kernel")


def reference(q_TNH, k_TMH, v_TMH, ends):
    """Torch double; every document alone, every position over its own prefix."""
    group = q_TNH.shape[1] // k_TMH.shape[1]
    out, start = [], 0
    for end in ends:
        for t in range(start, end):
            rows = []
            for head in range(q_TNH.shape[1]):
                k, v = k_TMH[start:t + 1, head // group], v_TMH[start:t + 1, head // group]
                rows.append(torch.softmax(k @ q_TNH[t, head] / q_TNH.shape[-1] ** 0.5, 0) @ v)
            out.append(torch.stack(rows))
        start = end
    return torch.stack(out)


def random_qkv(random, num_tokens, num_heads, num_kv_heads, head_dim):
    # Scores with a deviation of 4: attention that is neither flat nor one-hot.
    return [random.normal(0, 2, (num_tokens, heads, head_dim)).astype(np.float32)
            for heads in (num_heads, num_kv_heads, num_kv_heads)]


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (4, 2), (4, 1)])
def test_value_and_gradients_match_double_precision(mode, num_heads, num_kv_heads):
    random = np.random.default_rng(0)
    row_len, ends = 9, (4, 5, 9, 18, 20, 27)
    qkv = random_qkv(random, 27, num_heads, num_kv_heads, 6)
    direction = random.normal(0, 1, qkv[0].shape).astype(np.float32)

    def loss(q, k, v, cu_seqlens, direction):
        out = attention(q, k, v, cu_seqlens, row_len)
        return (out * direction).sum(), out

    value_and_grad = ms.value_and_grad(loss, (0, 1, 2), has_aux=True)

    def run(q, k, v, cu_seqlens, direction):
        return value_and_grad(q, k, v, cu_seqlens, direction)

    inputs = [Tensor(array) for array in (*qkv, np.array([0, *ends, 27, 27], np.int64), direction)]
    (_, out), gradients = (ms.jit(run) if mode == "graph" else run)(*inputs)
    double = [torch.tensor(array, dtype=torch.float64, requires_grad=True) for array in qkv]
    expected = reference(*double, ends)
    (expected * torch.tensor(direction)).sum().backward()
    # Float32 sums of up to 54 terms of size 2.
    np.testing.assert_allclose(out.asnumpy(), expected.detach().numpy(), rtol=0, atol=1e-5)
    for gradient, tensor in zip(gradients, double, strict=True):
        np.testing.assert_allclose(gradient.asnumpy(), tensor.grad.numpy(), rtol=0, atol=3e-5)


# The choice of kernels stands still while hypothesis runs its examples.
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_documents_of_any_length_are_apart(data):
    num_rows, row_len = data.draw(st.sampled_from([(1, 12), (3, 4), (2, 7)]))
    cuts = data.draw(st.sets(st.integers(1, num_rows * row_len - 1)))
    ends = sorted(cuts | {row_len * row for row in range(1, num_rows + 1)})
    padding = data.draw(st.integers(0, 3))
    qkv = random_qkv(np.random.default_rng(len(ends)), num_rows * row_len, 2, 1, 4)
    cu_seqlens = np.array([0, *ends] + padding * [num_rows * row_len], np.int64)
    out = attention(*map(Tensor, (*qkv, cu_seqlens)), row_len).asnumpy()
    expected = reference(*(torch.tensor(array, dtype=torch.float64) for array in qkv), ends)
    np.testing.assert_allclose(out, expected.numpy(), rtol=0, atol=1e-5)


def test_huge_scores_stay_finite():
    q, k, v = (np.full((4, 1, 2), value, np.float32) for value in (1e4, 1e4, 3))
    k[::2] *= -1
    out = attention(*map(Tensor, (q, k, v, np.array([0, 4], np.int64))), 4).asnumpy()
    np.testing.assert_allclose(out, 3.0, rtol=1e-6)


def last_of_reference(q, k_cache, v_cache, positions):
    """Every sequence's new token as the last of a document: the oracle of cached_attention, [B, N, H] float64."""
    rows = []
    num_kv_heads = len(k_cache) // len(q)
    for b, position in enumerate(positions):
        keys, values = (torch.tensor(cache[b * num_kv_heads:(b + 1) * num_kv_heads, :position + 1].transpose(1, 0, 2),
                                     dtype=torch.float64) for cache in (k_cache, v_cache))
        group = q.shape[1] // num_kv_heads
        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        scores = torch.einsum("nh,tnh->nt", torch.tensor(q[b], dtype=torch.float64), keys) / q.shape[-1] ** 0.5
        rows.append(torch.einsum("nt,tnh->nh", torch.softmax(scores, -1), values))
    return torch.stack(rows).numpy()


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim", "cache_len"),
                         [(4, 2, 6, 11), (3, 3, 32, 40), (8, 1, 128, 600), (14, 2, 72, 300)])
def test_cached_attention_reads_the_cache_up_to_each_position(mode, num_heads, num_kv_heads, head_dim, cache_len):
    random = np.random.default_rng(0)
    batch = 3
    q, k_cache, v_cache = (random.normal(0, 2, shape).astype(np.float32) for shape in (
        (batch, num_heads, head_dim), *2 * [(batch * num_kv_heads, cache_len, head_dim)]))
    positions = np.array([0, 4, cache_len - 1], np.int32)
    # What lies behind a position has not been written.
    for b, position in enumerate(positions):
        for cache in (k_cache, v_cache):
            cache[b * num_kv_heads:(b + 1) * num_kv_heads, position + 1:] = 1e4
    run = ms.jit(cached_attention) if mode == "graph" else cached_attention
    out = run(*map(Tensor, (q, k_cache, v_cache, positions))).asnumpy()
    # Float32 scores of up to 128 products of size 4, 50 at most.
    np.testing.assert_allclose(out, last_of_reference(q, k_cache, v_cache, positions), rtol=0, atol=3e-5)
