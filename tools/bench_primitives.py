"""Normalisation, activation, rotation, projections and embedding on CPU against PyTorch, forward and backward."""

import numpy as np

from mindpangu.runtime.device import num_usable_cores

from .bench_rows import Row, alternate, rates

_NUM_RUNS = 15


def bench_primitives():
    """The element-wise ops of a layer at 4096 tokens, in GB/s of what has to be read and written; peer: PyTorch."""
    import mindspore as ms
    import torch
    from mindspore import ops

    from mindpangu.ops.rms_norm import rms_norm
    from mindpangu.ops.rope import inverse_frequencies, rope_tables, split_rope
    from mindpangu.ops.swiglu import swiglu

    torch.set_num_threads(num_usable_cores())
    num_tokens, hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim = 4096, 768, 3072, 12, 6, 64
    cos, sin = rope_tables(ms.Tensor(np.arange(num_tokens, dtype=np.int32)),
                           ms.Tensor(inverse_frequencies(head_dim, 1e4)), ms.float32)
    peer_cos, peer_sin = torch.tensor(cos.asnumpy()), torch.tensor(sin.asnumpy())

    def our_norm(x, weight):
        return rms_norm(x, weight, 1e-5)

    def our_split(qkv):
        return ops.concat(split_rope(qkv, cos, sin, num_heads, num_kv_heads), 1)

    def peer_norm(x, weight):
        return torch.nn.functional.rms_norm(x, weight.shape, weight, 1e-5)

    def peer_swiglu(gate_up):
        gate, up = gate_up.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up

    def peer_rope(x):
        low, high = x.chunk(2, -1)
        return x * peer_cos.to(x.dtype) + torch.cat((-high, low), -1) * peer_sin.to(x.dtype)

    def peer_split(qkv):
        q, k, v = qkv.view(num_tokens, -1, head_dim).split((num_heads, num_kv_heads, num_kv_heads), 1)
        return torch.cat((peer_rope(q), peer_rope(k), v), 1)

    qkv_size = (num_heads + 2 * num_kv_heads) * head_dim
    works = [  # name, ours, peer, shapes of the inputs; tensors of the first input's size that pass each way, both ways
        ("rms_norm", our_norm, peer_norm, [(num_tokens, hidden_size), (hidden_size,)], 5),
        ("swiglu", swiglu, peer_swiglu, [(num_tokens, 2 * intermediate_size)], 4),
        ("split and rope (with a copy to one tensor)", our_split, peer_split, [(num_tokens, qkv_size)], 8),
    ]
    rows = []
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        for name, ours, peer, shapes, passes in works:
            if dtype == "bfloat16" and ours is our_split:
                continue  # MindSpore has no bfloat16 slice, which the copy's gradient is
            programs = _with_gradients(ours, peer, shapes, dtype)
            seconds = alternate(*programs, _NUM_RUNS)
            gigabytes = passes * size * np.prod(shapes[0]) / 1e9
            rows.append(Row(f"{name}, {num_tokens} tokens, forward + backward, {dtype}", "GB/s",
                            rates(gigabytes, seconds[0]), "PyTorch", rates(gigabytes, seconds[1]), 1.0))
    copied = ms.Tensor(np.zeros(num_tokens * hidden_size * 8, np.float32))
    peer_copied = torch.zeros(copied.size)
    programs = _waiting(ms.jit(_plus_one), (copied,)), lambda: peer_copied + 1
    programs[0]()
    seconds = alternate(*programs, _NUM_RUNS)
    rows.append(Row("x + 1, float32, for comparison", "GB/s", rates(8 * copied.size / 1e9, seconds[0]), "PyTorch",
                    rates(8 * copied.size / 1e9, seconds[1])))
    return rows


def bench_linear():
    """The biased projection of a layer with its three gradients, in GFLOP/s; peer: PyTorch's linear."""
    import torch

    from mindpangu.ops.linear import linear

    torch.set_num_threads(num_usable_cores())
    rows = []
    for num_tokens, num_in, num_out in ((2048, 256, 512), (4096, 768, 1536)):
        for dtype in ("float32", "bfloat16"):
            shapes = [(num_tokens, num_in), (num_out, num_in), (num_out,)]
            seconds = alternate(*_with_gradients(linear, torch.nn.functional.linear, shapes, dtype), _NUM_RUNS)
            gigaflops = 6 * num_tokens * num_in * num_out / 1e9
            rows.append(Row(f"linear {num_tokens} x {num_in} x {num_out}, forward + backward, {dtype}", "GFLOP/s",
                            rates(gigaflops, seconds[0]), "PyTorch", rates(gigaflops, seconds[1]), 1.0))
    return rows


def bench_embedding():
    """Rows of a table and the gradient of the whole table, in ms; peer: PyTorch's embedding."""
    import mindspore as ms
    import torch
    from mindspore import ops

    torch.set_num_threads(num_usable_cores())
    random, rows = np.random.default_rng(0), []
    for num_rows, size, num_tokens in ((32_000, 768, 4096), (153_376, 1536, 2048)):
        table = random.standard_normal((num_rows, size), dtype=np.float32)
        indices = random.integers(0, num_rows, num_tokens)
        direction = random.standard_normal((num_tokens, size), dtype=np.float32)
        peer_inputs = torch.tensor(table, requires_grad=True), torch.tensor(indices), torch.tensor(direction)

        def gather(table, indices):
            return ops.gather(table, indices, 0)

        vjp = ops.GradOperation(get_all=True, sens_param=True)(gather)

        def ours(table, indices, direction, vjp=vjp):
            return vjp(table, indices, direction)[0]

        def peer(inputs=peer_inputs):
            torch.autograd.grad(torch.nn.functional.embedding(inputs[1], inputs[0]), inputs[0], inputs[2])

        inputs = ms.Tensor(table), ms.Tensor(indices.astype(np.int32)), ms.Tensor(direction)
        run = _waiting(ms.jit(ours), inputs)
        run()
        seconds = alternate(run, peer, 5)
        rows.append(Row(f"embedding {num_rows} x {size}, gradient of {num_tokens} tokens", "ms",
                        [1e3 * duration for duration in seconds[0]], "PyTorch", [1e3 * d for d in seconds[1]], 1.0))
    return rows


def _plus_one(x):
    return x + 1


def _waiting(program, inputs):
    """A run of a program until its last result is there."""

    def run():
        out = program(*inputs)
        while isinstance(out, tuple):
            out = out[-1]
        out.asnumpy()

    return run


def _with_gradients(ours, peer, shapes, dtype):
    """Runs of both on the same numbers, value and all gradients; ours compiled and run once."""
    import mindspore as ms
    import torch
    from mindspore import ops

    random = np.random.default_rng(0)
    arrays = [random.standard_normal(shape, dtype=np.float32) for shape in shapes]
    inputs = [ms.Tensor(array).astype(getattr(ms, dtype)) for array in arrays]
    peer_inputs = [torch.tensor(array).to(getattr(torch, dtype)).requires_grad_() for array in arrays]
    direction = random.standard_normal(peer(*peer_inputs).shape, dtype=np.float32)
    vjp = ops.GradOperation(get_all=True, sens_param=True)(ours)

    def both(*inputs_and_direction):
        return vjp(*inputs_and_direction), ours(*inputs_and_direction[:-1])

    run = _waiting(ms.jit(both), (*inputs, ms.Tensor(direction).astype(getattr(ms, dtype))))
    peer_direction = torch.tensor(direction).to(getattr(torch, dtype))

    def run_peer():
        torch.autograd.grad(peer(*peer_inputs), peer_inputs, peer_direction)

    run()
    run_peer()
    return run, run_peer
