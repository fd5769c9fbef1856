"""Attention on CPU against PyTorch: packed documents with gradients, one long document, decoding over a cache."""

import numpy as np

from mindpangu.runtime.device import num_usable_cores

from .bench_rows import Row, alternate, rates

# openPangu Embedded-1B's attention.
_NUM_HEADS, _NUM_KV_HEADS, _HEAD_DIM = 12, 6, 128


def document_lengths(num_tokens, median, seed=0):
    """Log-normal lengths (sigma 1) that add up to num_tokens; the last document takes what is left."""
    random, lengths = np.random.default_rng(seed), []
    while num_tokens > 0:
        lengths.append(min(num_tokens, max(1, int(random.lognormal(np.log(median), 1.0)))))
        num_tokens -= lengths[-1]
    return lengths


def bench_attention():
    """32768 tokens in documents, forward and backward; and as one document, forward; the peer goes by documents."""
    lengths = document_lengths(32_768, 1000)
    rows = []
    for dtype in ("float32", "bfloat16"):
        rows += _compare(f"packed attention, 32768 tokens in {len(lengths)} documents, forward + backward, {dtype}",
                         lengths, dtype, backward=True, num_runs=3, wanted=3.0)
    rows += _compare("attention, one document of 32768 tokens, forward, bfloat16", [32_768], "bfloat16", backward=False,
                     num_runs=2, wanted=2.5)
    return rows


def bench_cached_attention():
    """One new token over a cache of 16384 positions, bound by reading it; peer: PyTorch's sum over as many bytes."""
    import mindspore as ms
    import torch
    from mindspore import Tensor

    from mindpangu.ops.attention import cached_attention

    torch.set_num_threads(num_usable_cores())
    cache_len, random, rows = 16_384, np.random.default_rng(0), []
    q = random.normal(0, 1, (1, _NUM_HEADS, _HEAD_DIM)).astype(np.float32)
    caches = [random.normal(0, 1, (_NUM_KV_HEADS, cache_len, _HEAD_DIM)).astype(np.float32) for _ in range(2)]
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        inputs = [Tensor(q), *(Tensor(cache).astype(getattr(ms, dtype)) for cache in caches),
                  Tensor(np.array([cache_len - 1], np.int32))]
        bytes_read = 2 * size * caches[0].size
        read = torch.ones(bytes_read // 4)
        peer_q, *peer_caches = (torch.tensor(x[None]).to(getattr(torch, dtype)) for x in (q, *caches))
        peer_q = peer_q.transpose(1, 2)

        def ours(inputs=inputs):
            cached_attention(*inputs).asnumpy()

        def sdpa(inputs=(peer_q, *peer_caches)):
            torch.nn.functional.scaled_dot_product_attention(*inputs, enable_gqa=True)

        for peer, name, wanted in ((read.sum, "PyTorch sum", 0.6), (sdpa, "PyTorch SDPA", None)):
            seconds = alternate(ours, peer, 11)
            rows.append(Row(f"attention of one token over {cache_len} cached, {dtype}", "GB/s",
                            rates(bytes_read / 1e9, seconds[0]), name, rates(bytes_read / 1e9, seconds[1]), wanted))
    return rows


def _compare(name, lengths, dtype, backward, num_runs, wanted):
    """Seconds against PyTorch, and our rate as a share of our own matrix product's."""
    ours, peer = _our_attention(lengths, dtype, backward), _peer_attention(lengths, dtype, backward)
    ours()  # compilation, allocation
    seconds = alternate(ours, peer, num_runs)
    pairs = sum(length * (length + 1) / 2 for length in lengths)
    gigaflops = (14 if backward else 4) * _NUM_HEADS * _HEAD_DIM * pairs / 1e9  # two products forward, five backward
    # Attention and a product of matrices by turns, so that a busy machine slows both.
    product, product_gigaflops = _our_product(dtype)
    products = alternate(ours, product, 3)
    return [
        Row(name, "s", seconds[0], "PyTorch SDPA", seconds[1], wanted),
        Row(f"{name}: rate", "GFLOP/s", rates(gigaflops, products[0]), "our matrix product",
            rates(product_gigaflops, products[1])),
    ]


def _arrays(num_tokens):
    random = np.random.default_rng(0)
    return [random.standard_normal((num_tokens, heads, _HEAD_DIM), dtype=np.float32)
            for heads in (_NUM_HEADS, _NUM_KV_HEADS, _NUM_KV_HEADS, _NUM_HEADS)]


def _our_attention(lengths, dtype, backward):
    import mindspore as ms
    from mindspore import Tensor, ops

    from mindpangu.ops.attention import attention

    num_tokens = sum(lengths)
    q, k, v, dy = (Tensor(array).astype(getattr(ms, dtype)) for array in _arrays(num_tokens))
    cu_seqlens = Tensor(np.array([0, *np.cumsum(lengths)], np.int64))

    def forward(q, k, v):
        return attention(q, k, v, cu_seqlens, num_tokens)

    def backward_too(q, k, v, dy):
        return vjp(q, k, v, dy)

    vjp = ops.GradOperation(get_all=True, sens_param=True)(forward)
    program, inputs = (ms.jit(backward_too), (q, k, v, dy)) if backward else (ms.jit(forward), (q, k, v))

    def run():
        out = program(*inputs)
        (out[-1] if backward else out).asnumpy()  # waits; the last gradient is that of v

    return run


def _peer_attention(lengths, dtype, backward):
    import torch

    torch.set_num_threads(num_usable_cores())
    q, k, v, dy = (torch.tensor(array).to(getattr(torch, dtype)).requires_grad_(backward)
                   for array in _arrays(sum(lengths)))

    def run():
        # Splitting whole tensors is the fastest way there: each slice's gradient would be as large as the whole.
        parts = zip(*(x.transpose(0, 1)[None].split(lengths, 2) for x in (q, k, v)), strict=True)
        out = torch.cat([torch.nn.functional.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True)
                         for part in parts], 2)[0].transpose(0, 1)
        if backward:
            torch.autograd.grad(out, (q, k, v), dy)

    return run


def _our_product(dtype):
    """A run of one 2048 x 2048 x 2048 product, and its GFLOP."""
    import mindspore as ms
    from mindspore import Tensor, ops

    size, product = 2048, ops.MatMul()
    x = Tensor(np.random.default_rng(0).standard_normal((size, size), dtype=np.float32)).astype(getattr(ms, dtype))

    def run():
        product(x, x).asnumpy()

    return run, 2 * size ** 3 / 1e9
