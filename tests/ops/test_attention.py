"""Attention against float64, document by document and position by position."""

import mindspore as ms
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mindspore import Parameter, Tensor, nn, ops

from mindpangu.ops.attention import attention, cached_attention, decode_attention

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


class Decoding(nn.Cell):
    """Steps of decoding in one graph: tokens [steps, B, heads, H] one after the other behind what the caches hold."""

    def __init__(self, k_cache, v_cache):
        super().__init__()
        self.k_cache, self.v_cache = (Parameter(Tensor(cache), name=name, requires_grad=False)
                                      for cache, name in ((k_cache, "k_cache"), (v_cache, "v_cache")))

    def construct(self, q, k, v, positions_B):
        i = ops.zeros((), ms.int32)
        out = ops.zeros_like(q)
        while i < q.shape[0]:
            attended = decode_attention(q[i], k[i], v[i], self.k_cache, self.v_cache, positions_B)
            out = ops.tensor_scatter_update(out, i.reshape(1, 1), ops.expand_dims(attended, 0))
            positions_B = positions_B + 1
            i = i + 1
        return out


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim", "cache_len"), [(4, 2, 6, 11), (3, 3, 32, 40)])
def test_decoding_writes_the_new_token_and_attends_over_all_before(mode, num_heads, num_kv_heads, head_dim, cache_len):
    random = np.random.default_rng(0)
    batch, steps = 3, 4
    caches = [random.normal(0, 2, (batch, num_kv_heads, cache_len, head_dim)).astype(np.float32) for _ in range(2)]
    q, k, v = (random.normal(0, 2, (steps, batch, heads, head_dim)).astype(np.float32)
               for heads in (num_heads, num_kv_heads, num_kv_heads))
    first = np.array([0, 5, cache_len - steps], np.int32)
    decoding = Decoding(*caches)
    out = (ms.jit(decoding.construct) if mode == "graph" else decoding.construct)(*map(Tensor, (q, k, v, first)))
    for step in range(steps):
        for cache, new in zip(caches, (k, v), strict=True):
            cache[np.arange(batch), :, first + step] = new[step]
        rows = [cache.reshape(batch * num_kv_heads, cache_len, head_dim) for cache in caches]
        np.testing.assert_allclose(out.asnumpy()[step], last_of_reference(q[step], *rows, first + step), rtol=0,
                                   atol=3e-5)
    np.testing.assert_array_equal(decoding.k_cache.asnumpy(), caches[0])
    np.testing.assert_array_equal(decoding.v_cache.asnumpy(), caches[1])


def packed_case():
    q, k, v = random_qkv(np.random.default_rng(0), 12, 4, 2, 6)
    return {"q": q, "k": k, "v": v, "cu_seqlens": np.array([0, 5, 12, 12], np.int64)}


def decode_case():
    q, k, v = random_qkv(np.random.default_rng(0), 3, 4, 2, 6)
    cache = np.zeros((3, 2, 9, 6), np.float32)
    return {"q": q, "k": k, "v": v, "k_cache": cache, "v_cache": cache, "positions": np.array([0, 3, 8], np.int32)}


def packed(q, k, v, cu_seqlens):
    return attention(q, k, v, cu_seqlens, 12)


def changed(function, argument, change):
    """A good call's tensors, but for one."""
    arrays = packed_case() if function is packed else decode_case()
    arrays[argument] = np.ascontiguousarray(change(arrays[argument]))
    return [Parameter(Tensor(array), name=name) if name.endswith("cache") else Tensor(array)
            for name, array in arrays.items()]


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize(("function", "argument", "change", "message"), [
    (packed, "q", lambda x: x[0], r"q has shape \[4, 6\], expected \[any, any, any\], tokens, heads and head size"),
    (packed, "q", lambda x: x[:, :3], "q has 3 heads, expected a multiple of k's, 2"),
    (packed, "q", lambda x: x.astype(np.int32), "q is int32, expected float32 or bfloat16 or float16"),
    (packed, "k", lambda x: x[:11], r"k has shape \[11, 2, 6\], expected \[12, any, 6\]"),
    (packed, "k", lambda x: x.astype(np.float16), "k is float16, expected float32"),
    (packed, "v", lambda x: x[..., :4], r"v has shape \[12, 2, 4\], expected \[12, 2, 6\]"),
    (packed, "cu_seqlens", lambda x: x.astype(np.int32), "cu_seqlens_C is int32, expected int64"),
    (packed, "cu_seqlens", lambda x: x[:1], "cu_seqlens_C has 1 lengths, expected at least 2"),
    (decode_attention, "q", lambda x: x[:, :3], "q has 3 heads, expected a multiple of k's, 2"),
    (decode_attention, "k_cache", lambda x: x[0], r"k_cache_BMSH has shape \[2, 9, 6\], expected \[3, 2, any, 6\]"),
    (decode_attention, "v_cache", lambda x: x[:, :, 1:],
     r"v_cache_BMSH has shape \[3, 2, 8, 6\], expected \[3, 2, 9, 6\]"),
    (decode_attention, "v_cache", lambda x: x.astype(np.float16), "v_cache_BMSH is float16, expected float32"),
    (decode_attention, "positions", lambda x: x.astype(np.int64), "positions_B is int64, expected int32"),
])
def test_an_argument_that_does_not_fit_is_named(mode, function, argument, change, message):
    arguments = changed(function, argument, change)
    with pytest.raises(ValueError, match="attention: " + message):
        (ms.jit(function) if mode == "graph" else function)(*arguments)


@pytest.mark.parametrize(("function", "argument", "change", "message"), [
    (packed, "cu_seqlens", lambda x: x + 1, "cu_seqlens_C goes from 1 to 13, expected 0 first and the number of tokens "
                                            "last, 12"),
    (packed, "cu_seqlens", lambda x: x[:2], "cu_seqlens_C goes from 0 to 5, expected 0 first"),
    (packed, "cu_seqlens", lambda x: x[[0, 2, 1, 3]], "cu_seqlens_C falls from 12 to 5 at place 2"),
    (decode_attention, "positions", lambda x: x + 1, "positions_B has 1 to 9, expected 0 to 8"),
    (decode_attention, "positions", lambda x: x - 1, "positions_B has -1 to 7, expected 0 to 8"),
])
def test_lengths_and_positions_that_do_not_fit_are_named_where_they_are_known(function, argument, change, message):
    arguments = changed(function, argument, change)
    with pytest.raises(ValueError, match="attention: " + message):
        function(*arguments)
