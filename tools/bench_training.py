"""Training steps against PyTorch: forward, backward, clipping and AdamW on the same architecture and tokens."""

import os
import tempfile
import time

import numpy as np

from mindpangu.config import ModelConfig, RunConfig, TrainConfig

from .bench_rows import Row, alternate, rates

# name: layers, hidden size, heads, key/value heads, feed-forward, vocabulary, documents, their length, runs, wanted
_MODELS = {
    "4 layers x 256, vocabulary 4096, 8 x 256 tokens": (4, 256, 4, 2, 1024, 4096, 8, 256, 9,
                                                        {"float32": 1.8, "bfloat16": 1.4}),
    "12 layers x 768, vocabulary 32000, 4 x 1024 tokens": (12, 768, 12, 6, 2048, 32000, 4, 1024, 3,
                                                           {"float32": 1.4, "bfloat16": 1.4}),
}


def bench_training():
    """Two sizes, float32 and bfloat16, against PyTorch eager and compiled; a document is a row of the peer's batch."""
    rows = []
    for name, (*sizes, num_runs, wanted) in _MODELS.items():
        for precision in ("float32", "bfloat16"):
            ours = _our_step(sizes, precision)
            for kind in ("eager", "compiled"):
                peer = _peer_step(sizes, precision, kind)
                for _ in range(2):  # compilation, allocation
                    ours(), peer()
                seconds = alternate(ours, peer, num_runs)
                rows.append(Row(f"training step, {name}, {precision}", "s", seconds[0], f"PyTorch {kind}", seconds[1],
                                wanted[precision]))
            product, peer_product, gigaflops = _products(precision)
            products = alternate(product, peer_product, 7)
            rows.append(Row(f"matrix product 2048^3, {precision}", "GFLOP/s", rates(gigaflops, products[0]), "PyTorch",
                            rates(gigaflops, products[1])))
            rows.append(Row(f"training step, {name}, {precision}: rate", "GFLOP/s",
                            rates(_step_gigaflops(sizes), seconds[0]), "our matrix product",
                            rates(gigaflops, products[0])))
    return rows


def bench_one_core():
    """What a step costs when all threads have to share one core: no more than 2.2 times what it costs on two."""
    name, (*sizes, _, _) = next(iter(_MODELS.items()))
    step = _our_step(sizes, "float32")
    cores = os.sched_getaffinity(0)

    def pinned(allowed):
        for task in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(task), allowed)
        step()

    step(), pinned(cores)
    seconds = alternate(lambda: pinned({min(cores)}), lambda: pinned(cores), 7)
    return [Row(f"training step, {name}, float32, pinned to one core", "s", seconds[0], f"{len(cores)} cores",
                seconds[1], 1 / 2.2)]


def bench_compilation():
    """CPU seconds until the first step of a 26-layer model is done: openpangu_1b's graph at a twelfth of its width."""
    began = time.process_time()
    _our_step((26, 192, 12, 6, 512, 4096, 2, 64), "float32")()
    return [Row("compilation, training step of 26 layers", "CPU s", [time.process_time() - began], "limit", [60.0],
                1.0)]


def _step_gigaflops(sizes):
    """Of the products of a step: each weight six times a token, attention's seven products over the pairs it sees."""
    layers, hidden, heads, kv_heads, feed_forward, vocab_size, num_documents, length = sizes
    per_layer = hidden * (hidden + 2 * hidden // heads * kv_heads) + hidden * hidden + 3 * hidden * feed_forward
    weights = 6 * num_documents * length * (layers * per_layer + vocab_size * hidden)
    return (weights + 14 * layers * hidden * num_documents * length * (length + 1) / 2) / 1e9


def _products(precision):
    """Our product of two 2048 x 2048 matrices, PyTorch's, and their billions of operations."""
    import torch
    from mindspore import Tensor, jit

    from mindpangu.ops.linear import linear

    size = 2048
    array = np.random.default_rng(0).standard_normal((size, size), dtype=np.float32)
    x, peer_x = Tensor(array), torch.tensor(array).to(getattr(torch, precision))
    product = jit(linear)

    def ours():
        product(x, x).asnumpy()

    def theirs():
        torch.nn.functional.linear(peer_x, peer_x)

    ours(), theirs()
    return ours, theirs, 2 * size**3 / 1e9


def bench_adamw():
    """100 million parameters in tensors of 4M: 7 arrays of 4 bytes pass through memory; a copy moves two."""
    import torch
    from mindspore import Parameter, Tensor, jit

    from mindpangu.ops.adamw import adamw

    shape, count = (2048, 2048), 24
    random = np.random.default_rng(0)
    arrays = [random.standard_normal(shape, dtype=np.float32) for _ in range(count)]
    ours = [[Parameter(Tensor(array), name=f"{kind}.{i}") for i, array in enumerate(arrays)] for kind in "pmvg"]
    settings = [Tensor(np.array(value, np.float32)) for value in ([1e-4, 0.9, 0.95, 1e-8, 0.1], 1.0, [1.0] * count)]
    theirs = [torch.nn.Parameter(torch.tensor(array)) for array in arrays]
    for parameter in theirs:
        parameter.grad = parameter.detach().clone()
    optimizer = torch.optim.AdamW(theirs, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    @jit
    def update(hyperparameters, scale, decays):
        return adamw(*ours, scale, hyperparameters, decays)

    def step():
        update(*settings).asnumpy()

    step(), optimizer.step()
    seconds = alternate(step, optimizer.step, 9)
    source = torch.empty(count * shape[0] * shape[1])
    target = torch.empty_like(source)
    copies = alternate(lambda: target.copy_(source), step, 9)
    moved = 4 * source.numel()
    bandwidth = [[2 * moved / duration / 1e9 for duration in copies[0]],
                 [7 * moved / duration / 1e9 for duration in copies[1]]]
    return [
        Row("fused AdamW, 100M parameters", "s", seconds[0], "PyTorch fused", seconds[1], 1.0),
        Row("fused AdamW, bandwidth", "GB/s", bandwidth[1], "PyTorch copy", bandwidth[0], 0.8),
    ]


def _tokens(sizes):
    *_, vocab_size, num_documents, length = sizes
    return np.random.default_rng(0).integers(3, vocab_size, (num_documents, length)).astype(np.int32)


def _our_step(sizes, precision):
    from mindspore import Tensor

    from mindpangu.model.pangu import Pangu
    from mindpangu.runtime.device import cpu_library
    from mindpangu.runtime.loop import Loop
    from mindpangu.trainers.language_model import METRICS, make_loss

    layers, hidden, heads, kv_heads, feed_forward, vocab_size, num_documents, length = sizes
    config = ModelConfig(hidden_size=hidden, num_layers=layers, num_heads=heads, num_kv_heads=kv_heads,
                         head_dim=hidden // heads, intermediate_size=feed_forward, vocab_size=vocab_size,
                         max_seq_len=length, rope_theta=1e4, eos_id=2)
    tokens = _tokens(sizes)
    num_tokens = tokens.size
    place = np.arange(num_tokens, dtype=np.int32)
    is_target = place % length != 0
    ends = np.arange(num_documents + 1, dtype=np.int64) * length
    arrays = [tokens.reshape(1, -1), (place % length)[None], ends[None],
              (place[is_target] - 1)[None], tokens.reshape(-1)[is_target][None],
              np.ones((1, int(is_target.sum())), np.float32)]
    model = Pangu(config)
    train = TrainConfig(steps=1000, rows_per_step=1, micro_batch_rows=1, lr=1e-4)
    loop = Loop(make_loss(model, length, 1024), METRICS, model.trainable_params(), train=train, run=RunConfig(),
                num_steps=1000, folder=tempfile.mkdtemp(), save_model=None)
    inputs, one = [Tensor(array) for array in arrays], Tensor(1)
    hyperparameters = loop.optimizer.hyperparameters(0, 1e-4)

    def step():
        cpu_library().pangu_set_bf16_products(int(precision == "bfloat16"))
        loss = loop.training_step(hyperparameters, one, *inputs)[0]
        return float(loss.asnumpy())

    return step


def _peer_step(sizes, precision, kind):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, hidden, heads, kv_heads, feed_forward, vocab_size, num_documents, length = sizes
    model = LlamaForCausalLM(LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=feed_forward, vocab_size=vocab_size, tie_word_embeddings=True, attention_bias=True,
        max_position_embeddings=length, attn_implementation="sdpa"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.tensor(_tokens(sizes), dtype=torch.long)

    def loss_of(tokens):
        return model(tokens, labels=tokens, use_cache=False).loss

    compute = torch.compile(loss_of) if kind == "compiled" else loss_of

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            loss = compute(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step
