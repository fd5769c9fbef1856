"""FlashAttentionScore and its gradient on CPU, and attention over a cache, against torch autograd in float64."""

import mindspore as ms
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mindspore import Tensor, ops
from mindspore.ops.auto_generate import FlashAttentionScore

from mindpangu.ops import kernels
from mindpangu.ops.attention import attention, cached_attention

pytestmark = pytest.mark.usefixtures("mindspore_cpu")

# Relative to the largest element. float32: sums of hundreds of products. bfloat16: inputs are exact; probabilities,
# their gradients and the results are rounded to 2^-9, and dy . out is taken from the rounded out.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1.2e-2}
# The fixture stands still while hypothesis runs its examples.
examples = settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def native(cpu_library, mindspore_cpu):
    kernels.select("native", [], "CPU", cpu_library.path)
    yield cpu_library
    kernels.select("reference", [], "CPU", cpu_library.path)


def rounded(array, dtype):
    """The values that a tensor of this dtype holds, as float32."""
    return Tensor(array).astype(getattr(ms, dtype)).astype(ms.float32).asnumpy()


def reference(q_SNH, k_SMH, v_SMH, hidden):
    """One document in torch double; hidden: bool, broadcast to [N, Sq, Sk]. Rows that see nothing are 0."""
    group = q_SNH.shape[1] // k_SMH.shape[1]
    k, v = k_SMH.repeat_interleave(group, 1), v_SMH.repeat_interleave(group, 1)
    scores = torch.einsum("snh,tnh->nst", q_SNH, k) / q_SNH.shape[-1] ** 0.5
    hidden = torch.as_tensor(hidden).expand(scores.shape)
    weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1)
    weights = torch.where(hidden.all(-1, keepdim=True), 0.0, weights)
    return torch.einsum("nst,tnh->snh", weights, v)


def causal(num_queries, num_keys):
    """sparse_mode 3: the last query sees all keys."""
    return torch.triu(torch.ones(num_queries, num_keys, dtype=torch.bool), num_keys - num_queries + 1)


def run(layout, sparse_mode, q, k, v, dy, mode="eager", **options):
    """Output and the gradients of q, k and v for an incoming dy, all as float32 arrays."""
    num_heads = options.pop("num_heads", q.shape[1])
    head_dim = options.pop("head_dim", q.shape[-1])

    def loss(q, k, v, dy):
        out = ops.flash_attention_score(q, k, v, num_heads, scalar_value=head_dim ** -0.5, input_layout=layout,
                                        sparse_mode=sparse_mode, **options)
        return (out.astype(ms.float32) * dy.astype(ms.float32)).sum(), out

    value_and_grad = ms.value_and_grad(loss, (0, 1, 2), has_aux=True)

    def both(q, k, v, dy):
        return value_and_grad(q, k, v, dy)

    (_, out), gradients = (ms.jit(both) if mode == "graph" else both)(q, k, v, dy)
    return [x.astype(ms.float32).asnumpy() for x in (out, *gradients)]


def check(ours, tensors, expected, dy, dtype, arrange=lambda y: y):
    (expected * torch.tensor(dy, dtype=torch.float64)).sum().backward()
    results = expected.detach(), *(tensor.grad for tensor in tensors)
    for name, x, y in zip(("out", "dq", "dk", "dv"), ours, results, strict=True):
        largest = max(1.0, y.abs().max().item())
        np.testing.assert_allclose(x, arrange(y.numpy()), rtol=0, atol=TOLERANCE[dtype] * largest, err_msg=name)


def packed(random, lengths, num_heads, num_kv_heads, head_dim, dtype, scale=1.0):
    num_tokens = sum(lengths)
    q, k, v, dy = (rounded(random.normal(0, scale, (num_tokens, heads, head_dim)).astype(np.float32), dtype)
                   for heads in (num_heads, num_kv_heads, num_kv_heads, num_heads))
    return q, k, v, dy


def check_packed(lengths, arrays, dtype, mode="eager", padding=0):
    q, k, v, dy = arrays
    ends = Tensor(np.array([*np.cumsum(lengths), *padding * [len(q)]], np.int64))
    tensors = [Tensor(x).astype(getattr(ms, dtype)) for x in arrays]
    ours = run("TND", 3, *tensors, mode=mode, actual_seq_qlen=ends, actual_seq_kvlen=ends)
    double = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (q, k, v)]
    parts = zip(*(torch.split(x, lengths) for x in double), strict=True)
    expected = torch.cat([reference(*part, causal(len(part[0]), len(part[0]))) for part in parts])
    check(ours, double, expected, dy, dtype)


@examples
@given(lengths=st.lists(st.integers(0, 70), min_size=1, max_size=6).filter(any), num_kv_heads=st.integers(1, 3),
       group=st.sampled_from([1, 2, 4]), head_dim=st.sampled_from([8, 24, 40, 64, 100, 128]), padding=st.integers(0, 2),
       dtype=st.sampled_from(["float32", "bfloat16"]), seed=st.integers(0, 99))
def test_packed_documents_and_gradients_match_double_precision(lengths, num_kv_heads, group, head_dim, padding, dtype,
                                                               seed):
    arrays = packed(np.random.default_rng(seed), lengths, num_kv_heads * group, num_kv_heads, head_dim, dtype)
    check_packed(lengths, arrays, dtype, padding=padding)


# One document is shared by tasks that each sum a part of dk and dv; with several it is not.
@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lengths", [[700], [1, 333, 96, 128, 200, 1]])
def test_documents_longer_than_blocks_match_double_precision(lengths, dtype, mode):
    check_packed(lengths, packed(np.random.default_rng(0), lengths, 4, 2, 64, dtype), dtype, mode)


def test_large_scores_keep_their_precision():
    # Scores reach 60: the softmax is nearly one-hot, and float32 scores are 4e-6 apart.
    lengths = [150, 40]
    q, k, v, dy = packed(np.random.default_rng(0), lengths, 2, 1, 32, "float32")
    check_packed(lengths, (3.5 * q, 3.5 * k, v, dy), "float32")


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_bfloat16_products_on_float32_tensors_are_as_exact_as_bfloat16(cpu_library, mode):
    arrays = packed(np.random.default_rng(0), [300, 31], 4, 2, 40, "bfloat16")
    cpu_library.pangu_set_bf16_products(1)
    try:
        q, k, v, dy = arrays
        ends = Tensor(np.array([300, 331], np.int64))
        ours = run("TND", 3, *map(Tensor, arrays), mode=mode, actual_seq_qlen=ends, actual_seq_kvlen=ends)
    finally:
        cpu_library.pangu_set_bf16_products(0)
    double = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (q, k, v)]
    expected = torch.cat([reference(*part, causal(len(part[0]), len(part[0])))
                          for part in zip(*(torch.split(x, [300, 31]) for x in double), strict=True)])
    assert np.abs(ours[0] - expected.detach().numpy()).max() > 1e-5  # they were rounded
    check(ours, double, expected, dy, "bfloat16")


def as_layout(x_BSNH, layout):
    if layout == "BNSD":
        return x_BSNH.transpose(0, 2, 1, 3)
    if layout == "BSND":
        return x_BSNH
    x_BSD = x_BSNH.reshape(*x_BSNH.shape[:2], -1)
    return x_BSD if layout == "BSH" else x_BSD.transpose(1, 0, 2)


@examples
@given(st.data())
def test_layouts_masks_and_sparse_modes_match_double_precision(data):
    layout = data.draw(st.sampled_from(["BSH", "BNSD", "SBH", "BSND"]))
    sparse_mode = data.draw(st.sampled_from([0, 0, 1, 2, 3, 4]))
    batch, num_kv_heads, group = data.draw(st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 2)))
    num_queries, num_keys = data.draw(st.tuples(st.integers(1, 140), st.integers(1, 140)))
    head_dim = data.draw(st.sampled_from([16, 24, 64]))
    dtype = data.draw(st.sampled_from(["float32", "bfloat16"]))
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    num_heads = num_kv_heads * group
    shapes = [(batch, length, heads, head_dim) for length, heads in (
        (num_queries, num_heads), (num_keys, num_kv_heads), (num_keys, num_kv_heads), (num_queries, num_heads))]
    arrays = [rounded(random.normal(0, 1, shape).astype(np.float32), dtype) for shape in shapes]
    distance = torch.arange(num_keys)[None] - torch.arange(num_queries)[:, None]
    hidden = torch.zeros(batch, num_heads, num_queries, num_keys, dtype=torch.bool)
    options = {"num_heads": num_heads, "head_dim": head_dim}
    if sparse_mode <= 1 and data.draw(st.booleans()):
        shape = data.draw(st.sampled_from([(1, 1), (batch, 1), (batch, num_heads)]))
        mask = random.random((*shape, num_queries, num_keys)) < data.draw(st.sampled_from([0.2, 0.99]))
        hidden = hidden | torch.tensor(mask)
        mask = mask[0, 0] if shape == (1, 1) else mask
        options["attn_mask"] = Tensor(mask if data.draw(st.booleans()) else mask.astype(np.uint8))
        if sparse_mode == 0:
            options |= {"pre_tokens": 90, "next_tokens": 5}
            hidden = hidden | (distance < -90) | (distance > 5)
    elif sparse_mode >= 2:
        shift = 0 if sparse_mode == 2 else num_keys - num_queries
        after, before = (3, 20) if sparse_mode == 4 else (0, 10**6)
        options |= {"pre_tokens": before, "next_tokens": after}
        hidden = hidden | (distance > shift + after) | (distance < shift - before)
    tensors = [Tensor(np.ascontiguousarray(as_layout(x, layout))).astype(getattr(ms, dtype)) for x in arrays]
    ours = run(layout, sparse_mode, *tensors, **options)
    double = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in arrays[:3]]
    expected = torch.stack([reference(*parts) for parts in zip(*double, hidden, strict=True)])
    check(ours, double, expected, arrays[3], dtype, lambda y: as_layout(y, layout))


def test_tuples_and_tensors_of_lengths_are_the_same():
    q, k, v, dy = map(Tensor, packed(np.random.default_rng(0), [3, 9], 2, 1, 16, "float32"))
    ends = Tensor(np.array([3, 12], np.int64))
    first = run("TND", 3, q, k, v, dy, actual_seq_qlen=ends, actual_seq_kvlen=ends)
    second = run("TND", 3, q, k, v, dy, actual_seq_qlen=(3, 12), actual_seq_kvlen=(3, 12))
    for x, y in zip(first, second, strict=True):
        np.testing.assert_array_equal(x, y)


def test_queries_of_a_document_are_its_last_positions():
    random = np.random.default_rng(0)
    q_lengths, kv_lengths = [2, 5, 1], [7, 5, 130]
    q, k, v, dy = (random.normal(0, 1, (num_tokens, heads, 16)).astype(np.float32)
                   for num_tokens, heads in ((8, 4), (142, 2), (142, 2), (8, 4)))
    ours = run("TND", 3, *map(Tensor, (q, k, v, dy)), actual_seq_qlen=tuple(np.cumsum(q_lengths).tolist()),
               actual_seq_kvlen=tuple(np.cumsum(kv_lengths).tolist()))
    double = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (q, k, v)]
    lengths = q_lengths, kv_lengths, kv_lengths
    parts = zip(*(torch.split(x, n) for x, n in zip(double, lengths, strict=True)), strict=True)
    expected = torch.cat([reference(*part, causal(len(part[0]), len(part[1]))) for part in parts])
    check(ours, double, expected, dy, "float32")


def test_softmax_statistics_are_the_maximum_and_the_sum():
    q, k, v, _ = packed(np.random.default_rng(0), [130], 2, 1, 16, "float32")
    kernel = FlashAttentionScore(2, 1.0, 0.25, 2147483647, 0, 0, "TND", 3)
    largest, total, _, _ = kernel(*map(Tensor, (q, k, v)), None, None, None, None, None, (130,), (130,))
    scores = np.einsum("snh,tmh->snt", q.astype(np.float64), k.astype(np.float64)) * 0.25
    scores = np.where(np.arange(130)[:, None, None] < np.arange(130), -np.inf, scores)
    expected = scores.max(-1)
    np.testing.assert_allclose(largest.asnumpy(), np.repeat(expected[..., None], 8, -1), rtol=1e-5, atol=1e-6)
    expected = np.exp(scores - expected[..., None]).sum(-1)
    np.testing.assert_allclose(total.asnumpy(), np.repeat(expected[..., None], 8, -1), rtol=1e-5)


def test_no_tokens_are_no_output():
    arrays = packed(np.random.default_rng(0), [0], 2, 1, 16, "float32")
    for padding in (0, 2):
        ends = Tensor(np.zeros(1 + padding, np.int64))
        out = ops.flash_attention_score(*map(Tensor, arrays[:3]), 2, actual_seq_qlen=ends, actual_seq_kvlen=ends,
                                        input_layout="TND", sparse_mode=3)
        assert out.shape == (0, 2, 16)


def test_nan_and_infinity_reach_the_output():
    q, k, v, _ = packed(np.random.default_rng(0), [40, 40], 2, 1, 16, "float32")
    q[5, 1, 3] = np.nan
    k[50, 0, 2] = np.inf
    out = ops.flash_attention_score(*map(Tensor, (q, k, v)), 2, actual_seq_qlen=(40, 80), actual_seq_kvlen=(40, 80),
                                    scalar_value=0.25, input_layout="TND", sparse_mode=3).asnumpy()
    bad = ~np.isfinite(out).all(-1)
    assert bad[5].tolist() == [False, True]
    assert bad.sum() > 1
    assert bad[50:].any() and not bad[:50][np.arange(50) != 5].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lengths", [[450], [200, 1, 90, 300]])
def test_results_do_not_depend_on_the_number_of_threads(native, lengths, dtype):
    random = np.random.default_rng(0)
    tensors = [Tensor(x).astype(getattr(ms, dtype)) for x in packed(random, lengths, 4, 2, 40, dtype)]
    ends = tuple(np.cumsum(lengths).tolist())
    q = Tensor(random.normal(0, 1, (2, 4, 40)).astype(np.float32))
    caches = [Tensor(random.normal(0, 1, (4, 900, 40)).astype(np.float32)).astype(getattr(ms, dtype)) for _ in range(2)]
    results = []
    try:
        for num_threads in (1, 2, 3):
            native.pangu_set_num_threads(num_threads)
            results.append(run("TND", 3, *tensors, actual_seq_qlen=ends, actual_seq_kvlen=ends))
            results[-1].append(cached_attention(q, *caches, Tensor(np.array([899, 500], np.int32))).asnumpy())
    finally:
        native.pangu_set_num_threads(2)
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(x, y)


def test_another_library_may_use_the_processors_tiles_in_between():
    arrays = packed(np.random.default_rng(0), [300], 2, 2, 64, "bfloat16")
    tensors = [Tensor(x).astype(ms.bfloat16) for x in arrays]
    ends = Tensor(np.array([300], np.int64))
    before = run("TND", 3, *tensors, actual_seq_qlen=ends, actual_seq_kvlen=ends)
    # PyTorch's products in bfloat16 set the tiles' shapes and release them, where the processor has tiles.
    x = torch.randn(1, 2, 512, 64).bfloat16()
    torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
    torch.matmul(x, x.transpose(2, 3))
    after = run("TND", 3, *tensors, actual_seq_qlen=ends, actual_seq_kvlen=ends)
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("q_dtype", ["float32", "bfloat16"])
def test_a_bfloat16_cache_is_read_as_it_is(q_dtype):
    random = np.random.default_rng(0)
    q = rounded(random.normal(0, 1, (2, 6, 72)).astype(np.float32), q_dtype)
    k, v = (rounded(random.normal(0, 1, (4, 530, 72)).astype(np.float32), "bfloat16") for _ in range(2))
    out = cached_attention(Tensor(q).astype(getattr(ms, q_dtype)), *(Tensor(x).astype(ms.bfloat16) for x in (k, v)),
                           Tensor(np.array([529, 256], np.int64)))
    assert out.dtype == getattr(ms, q_dtype)
    k, v = (torch.tensor(x, dtype=torch.float64).reshape(2, 2, 530, 72) for x in (k, v))
    q = torch.tensor(q, dtype=torch.float64)
    expected = torch.cat([reference(q[b:b + 1], k[b, :, :n].transpose(0, 1), v[b, :, :n].transpose(0, 1), False)
                          for b, n in enumerate((530, 257))])
    # Sums are float32; only a bfloat16 output is rounded.
    tolerance = 1e-6 if q_dtype == "float32" else 2 ** -9
    np.testing.assert_allclose(out.astype(ms.float32).asnumpy(), expected.numpy(), rtol=0, atol=tolerance)


@pytest.mark.usefixtures("native")
def test_a_graph_of_attention_differentiates_what_was_asked():
    q, k, v, dy = map(Tensor, packed(np.random.default_rng(0), [30, 34], 4, 2, 16, "float32"))
    cu_seqlens = Tensor(np.array([0, 30, 64, 64], np.int64))

    def loss(q, k, v, cu_seqlens, dy):
        return (attention(q, k, v, cu_seqlens, 64) * dy).sum()

    whole = ms.jit(ms.grad(loss, (0, 1, 2)))(q, k, v, cu_seqlens, dy)
    values = ms.jit(ms.grad(loss, 2))(q, k, v, cu_seqlens, dy)
    np.testing.assert_array_equal(whole[2].asnumpy(), values.asnumpy())


def zeros(*shape, dtype=np.float32):
    return Tensor(np.zeros(shape, dtype))


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize(("message", "shapes", "dtype", "options"), [
    ("keep_prob is 0.9.*: expected 1: the CPU kernel has no dropout", [(4, 2, 8)] * 3, np.float32, {"keep_prob": 0.9}),
    ("actual_seq_qlen is ending with 3: expected the number of tokens, 4", [(4, 2, 8)] * 3, np.float32,
     {"actual_seq_qlen": (3,)}),
    ("actual_seq_kvlen is 1 after 2: expected non-decreasing", [(4, 2, 8)] * 3, np.float32,
     {"actual_seq_qlen": (2, 3, 4), "actual_seq_kvlen": (2, 1, 4)}),
    ("actual_seq_kvlen is 2 long: expected as long as actual_seq_qlen, 1", [(4, 2, 8)] * 3, np.float32,
     {"actual_seq_kvlen": (2, 4)}),
    ("real_shift is given: expected None", [(4, 2, 8)] * 3, np.float32, {"real_shift": zeros(1, 2, 4, 4)}),
    ("sparse_mode is 5: expected 0 to 4", [(4, 2, 8)] * 3, np.float32, {"sparse_mode": 5}),
    ("scale_value is 0.0.*: expected more than 0", [(4, 2, 8)] * 3, np.float32, {"scalar_value": 0.0}),
    ("attn_mask is given: expected None with input_layout TND and sparse_mode 0", [(4, 2, 8)] * 3, np.float32,
     {"sparse_mode": 0, "attn_mask": zeros(4, 4, dtype=np.uint8)}),
])
def test_what_is_not_served_is_named(mode, message, shapes, dtype, options):
    tensors = [zeros(*shape, dtype=dtype) for shape in shapes]
    options = {"actual_seq_qlen": (4,), "actual_seq_kvlen": (4,), "sparse_mode": 3, **options}

    def call(q, k, v):
        return ops.flash_attention_score(q, k, v, 2, input_layout="TND", **options)

    with pytest.raises(RuntimeError, match=f"FlashAttentionScore on CPU: {message}"):
        (ms.jit(call) if mode == "graph" else call)(*tensors).asnumpy()


@pytest.mark.usefixtures("native")
def test_a_position_outside_the_cache_is_named():
    with pytest.raises(RuntimeError, match="CachedAttention on CPU: positions is 5: expected 0 to 4"):
        cached_attention(zeros(1, 2, 8), zeros(2, 5, 8), zeros(2, 5, 8), zeros(1, dtype=np.int32) + 5).asnumpy()
