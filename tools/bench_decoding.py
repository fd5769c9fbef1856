"""Generation and the full-size forward pass against transformers on the same architecture, in tokens and seconds."""

import time

import numpy as np

from mindpangu.config import ModelConfig, RunConfig

from .bench_rows import Row, alternate, rates

# name: layers, hidden size, heads, key/value heads, feed-forward, vocabulary
_SMALL = ("4 layers x 256, vocabulary 4096", (4, 256, 4, 2, 1024, 4096))
_MEDIUM = ("100M: 12 layers x 768, vocabulary 32000", (12, 768, 12, 6, 2048, 32000))
_FULL = ("openpangu_1b", (26, 1536, 12, 6, 6144, 153376))
_PROMPT_LEN = 8  # so that decoding is what is timed


def bench_decoding():
    """Greedy tokens per second in float32, batch 1 and 8, against a loop over a static cache and generate()."""
    rows = []
    for (name, sizes), batch, num_tokens in ((_SMALL, 1, 128), (_SMALL, 8, 128), (_MEDIUM, 1, 64)):
        rows += _decoding_rows(name, sizes, "float32", batch, num_tokens, 1.5)
    return rows


def bench_openpangu_1b():
    """The 1B at full size in bfloat16: 1024 tokens forward and decoding; random weights, which both read from zeros."""
    import mindspore as ms
    import torch

    name, sizes = _FULL
    model, peer = _our_model(sizes, "bfloat16"), _peer_model(sizes, "bfloat16")
    tokens = np.random.default_rng(0).integers(3, sizes[-1], 1024).astype(np.int32)
    inputs = ms.Tensor(tokens), ms.Tensor(np.arange(1024, dtype=np.int32)), ms.Tensor(np.array([0, 1024]))
    peer_tokens = torch.tensor(tokens[None], dtype=torch.long)

    @ms.jit
    def forward(tokens, positions, ends):
        return model.logits(model(tokens, positions, ends, 1024)[-1:])

    def ours():
        forward(*inputs).asnumpy()

    def theirs():
        with torch.no_grad():
            peer(peer_tokens, logits_to_keep=1, use_cache=False)

    ours(), theirs()
    seconds = alternate(ours, theirs, 5)
    row = Row(f"{name}, 1024 tokens forward, bfloat16", "s", seconds[0], "transformers", seconds[1], 1.3)
    return [row, *_decoding_rows(name, sizes, "bfloat16", 1, 48, 2.0, model, peer, num_runs=3)]


def _decoding_rows(name, sizes, precision, batch, num_tokens, wanted, model=None, peer=None, num_runs=5):
    model, peer = model or _our_model(sizes, precision), peer or _peer_model(sizes, precision)
    prompts = np.random.default_rng(0).integers(3, sizes[-1], (batch, _PROMPT_LEN)).astype(np.int32)
    ours, loop = _our_generation(model, prompts, num_tokens), _peer_loop(peer, prompts, num_tokens)
    generate = _peer_generate(peer, prompts, num_tokens)
    rows = []
    for peer_name, theirs in (("transformers, eager, static cache", loop), ("transformers.generate", generate)):
        ours(), theirs()
        seconds = alternate(ours, theirs, num_runs)
        our_rates, their_rates = (rates(batch * num_tokens, durations) for durations in seconds)
        rows.append(Row(f"decoding, {name}, batch {batch}, {precision}", "tokens/s", our_rates, peer_name, their_rates,
                        wanted))
    # Each token reads all weights (the embedding's as the output projection) and half of the full cache.
    layers, hidden, heads, kv_heads, feed_forward, vocab_size = sizes
    kv_size = hidden // heads * kv_heads
    per_layer = hidden * (hidden + 2 * kv_size) + hidden * hidden + 3 * hidden * feed_forward
    read = (2 if precision == "bfloat16" else 4) * (layers * per_layer + vocab_size * hidden)
    read += 4 * layers * batch * 2 * kv_size * (_PROMPT_LEN + num_tokens // 2)
    rows.append(Row(f"decoding, {name}, batch {batch}, {precision}: weights and cache read", "GB/s",
                    rates(read * num_tokens / 1e9, seconds[0]), "reading memory", _read_bandwidth(),
                    0.6 if read > 1e8 else None))
    return rows


def _read_bandwidth():
    """GB/s of a sum over 1 GB on all cores."""
    import torch

    x = torch.ones(1 << 28)
    durations = []
    for _ in range(5):
        began = time.perf_counter()
        x.sum()
        durations.append(time.perf_counter() - began)
    return [4 * x.numel() / duration / 1e9 for duration in durations]


def _our_model(sizes, precision):
    import mindspore as ms

    from mindpangu.model.pangu import Pangu
    from mindpangu.runtime.device import cpu_library

    cpu_library().pangu_set_bf16_products(int(precision == "bfloat16"))
    layers, hidden, heads, kv_heads, feed_forward, vocab_size = sizes
    config = ModelConfig(hidden_size=hidden, num_layers=layers, num_heads=heads, num_kv_heads=kv_heads,
                         head_dim=hidden // heads, intermediate_size=feed_forward, vocab_size=vocab_size,
                         max_seq_len=2048, rope_theta=1e4, eos_id=2)
    return Pangu(config, frozen_dtype=ms.bfloat16 if precision == "bfloat16" else None)


def _our_generation(model, prompts, num_tokens):
    from mindpangu.model.generate import Generator

    generator = Generator(model, num_slots=len(prompts), prompt_len=_PROMPT_LEN, max_new_tokens=num_tokens, eos_id=-1,
                          pad_id=0, temperature=0.0, mode=RunConfig().mode)

    def run():
        answers = generator.generate(list(prompts))
        assert all(len(answer.tokens) == num_tokens for answer in answers)

    return run


def _peer_model(sizes, precision):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, hidden, heads, kv_heads, feed_forward, vocab_size = sizes
    config = LlamaConfig(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
                         num_key_value_heads=kv_heads, intermediate_size=feed_forward, vocab_size=vocab_size,
                         tie_word_embeddings=True, attention_bias=True, max_position_embeddings=2048,
                         attn_implementation="sdpa", dtype=getattr(torch, precision))
    return LlamaForCausalLM(config).to(getattr(torch, precision)).eval()


def _peer_loop(model, prompts, num_tokens):
    import torch
    from transformers import StaticCache

    prompts = torch.tensor(prompts, dtype=torch.long)
    cache_len = _PROMPT_LEN + num_tokens

    @torch.no_grad()
    def run():
        cache = StaticCache(config=model.config, max_cache_len=cache_len)
        positions = torch.arange(_PROMPT_LEN)
        tokens = prompts
        for _ in range(num_tokens):
            logits = model(tokens, past_key_values=cache, cache_position=positions, use_cache=True,
                           logits_to_keep=1).logits
            tokens = logits[:, -1:].argmax(-1)
            positions = positions[-1:] + 1

    return run


def _peer_generate(model, prompts, num_tokens):
    import torch

    prompts = torch.tensor(prompts, dtype=torch.long)

    @torch.no_grad()
    def run():
        out = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=num_tokens,
                             min_new_tokens=num_tokens, do_sample=False, pad_token_id=0)
        assert out.shape[1] == _PROMPT_LEN + num_tokens

    return run
