"""The data side: packing, and the cache of the teacher's log-probabilities."""

import os
import tempfile
from pathlib import Path

import numpy as np

from mindpangu.data.pack import pack_best_fit
from mindpangu.data.shards import read_shard, write_shard
from mindpangu.distillation.cache import decode_topk, encode_topk

from .bench_rows import Row, alternate, rates


def naive_best_fit(lengths_N, capacity):
    """Tokens per row of best-fit decreasing with a NumPy scan over all open rows for each sample."""
    rooms_R, num_rows = np.zeros(lengths_N.size, np.int64), 0
    for length in np.sort(lengths_N)[::-1]:
        fits = np.where(rooms_R[:num_rows] >= length, rooms_R[:num_rows], capacity + 1)
        row = fits.argmin() if num_rows else 0
        if num_rows == 0 or fits[row] > capacity:
            row, rooms_R[num_rows] = num_rows, capacity
            num_rows += 1
        rooms_R[row] -= length
    return capacity - rooms_R[:num_rows]


def bench_packing():
    """100k samples of log-normal length (100 to 32768, median 665 tokens) into rows of 32768."""
    lengths_N = np.clip(np.random.default_rng(0).lognormal(6.5, 1.0, 100_000), 100, 32768).astype(np.int64)
    ours, peer = alternate(lambda: pack_best_fit(lengths_N, 32768), lambda: naive_best_fit(lengths_N, 32768), 3)
    num_rows = pack_best_fit(lengths_N, 32768)[1].size - 1
    fill = [float(100 * lengths_N.sum() / (rows * 32768)) for rows in (num_rows, naive_best_fit(lengths_N, 32768).size)]
    return [
        Row("pack_best_fit, 100k samples to 32K", "samples/s", rates(100_000, ours), "row scan", rates(100_000, peer)),
        Row("pack_best_fit, fill", "%", fill[:1], "row scan", fill[1:]),
    ]


def zipf_teacher(num_tokens, vocab_size, k, exponent=1.15, noise=2.0, seed=0):
    """A synthetic teacher: logits -exponent * ln(v + 1) + normal noise, one token of the context lifted to the top.

    The lifted token is log-uniform over the vocabulary; it leads the others by an exponential margin of mean 2 nats,
    less half a nat. Ids are shuffled once, because a real vocabulary isn't in the order of a data set's frequencies.
    Labels are drawn from the teacher. Returns ids_NK int32, logprobs_NK float32 (whole vocabulary), label_ids_N int32,
    label_logprobs_N float32.
    """
    rng = np.random.default_rng(seed)
    zipf_V = (-exponent * np.log(np.arange(1, vocab_size + 1))).astype(np.float32)
    # Every context sees another window of one noise array: drawing normals for every token would take most of the time.
    noises = rng.standard_normal(4 * vocab_size, dtype=np.float32) * np.float32(noise)
    ids_NK, logprobs_NK = np.empty((num_tokens, k), np.int32), np.empty((num_tokens, k), np.float32)
    label_ids_N, label_logprobs_N = np.empty(num_tokens, np.int32), np.empty(num_tokens, np.float32)
    for n in range(num_tokens):
        window = rng.integers(3 * vocab_size)
        logits_V = zipf_V + noises[window : window + vocab_size]
        lifted = int(np.exp(rng.uniform(0, np.log(vocab_size)))) - 1
        logits_V[lifted] = logits_V.max() + rng.exponential(2.0) - 0.5
        top = logits_V.max()
        cumulative_V = np.cumsum(np.exp(logits_V - top), dtype=np.float64)
        logprobs_V = logits_V - (top + np.log(cumulative_V[-1]))
        # The k-th largest of the first ids bounds the k-th largest of all from below: few candidates to sort.
        candidates = np.flatnonzero(logits_V >= np.sort(logits_V[: 1000 + k])[-k])
        ids_NK[n] = candidates[np.argsort(-logits_V[candidates], kind="stable")[:k]]
        logprobs_NK[n] = logprobs_V[ids_NK[n]]
        label_ids_N[n] = min(np.searchsorted(cumulative_V, rng.random() * cumulative_V[-1]), vocab_size - 1)
        label_logprobs_N[n] = logprobs_V[label_ids_N[n]]
    shuffled_V = rng.permutation(vocab_size).astype(np.int32)
    return shuffled_V[ids_NK], logprobs_NK, shuffled_V[label_ids_N], label_logprobs_N


def kl_of_stored(logprobs_NK, stored_NK):
    """KL(teacher || stored teacher) per token over the K tokens and the rest of the vocabulary as one outcome, nats."""
    original, stored = np.asarray(logprobs_NK, np.float64), np.asarray(stored_NK, np.float64)
    tail, stored_tail = 1 - np.exp(original).sum(1), np.maximum(1 - np.exp(stored).sum(1), 1e-12)
    inside = np.where(np.isneginf(original), 0, np.exp(original) * (np.maximum(original, -1e4) - stored)).sum(1)
    # A tail that float32 rounding left at or below zero has no mass to compare.
    return inside + np.where(tail > 0, tail * np.log(np.maximum(tail, 1e-300) / stored_tail), 0)


def bench_cache():
    """Top-10 of the synthetic teacher, vocabulary 153376; peer: int32 ids and float16 log-probabilities in a shard."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path, peer_path = Path(folder, "ours.shard"), Path(folder, "peer.shard")
        for num_tokens, exponent, noise in ((16_000, 1.15, 2.0), (4000, 1.0, 2.0), (4000, 1.3, 2.0), (4000, 1.15, 3.0)):
            name = f"cache {num_tokens} tokens, Zipf {exponent} noise {noise:g}"
            ids_NK, logprobs_NK, label_ids_N, label_logprobs_N = zipf_teacher(num_tokens, 153_376, 10, exponent, noise)
            halves = logprobs_NK.astype(np.float16), label_logprobs_N.astype(np.float16)
            plain = {"ids": ids_NK, "logprobs": halves[0], "label": halves[1]}

            def encode(given=(ids_NK, logprobs_NK, label_ids_N, label_logprobs_N)):
                write_shard(path, encode_topk(*given, 153_376))

            encoding = alternate(encode, lambda plain=plain: write_shard(peer_path, plain), 5)
            decoding = alternate(lambda: decode_topk(read_shard(path)), lambda: read_shard(peer_path), 5)
            sizes = [[os.path.getsize(file) / len(ids_NK)] for file in (path, peer_path)]
            stored_NK = decode_topk(read_shard(path))[1]
            assert np.array_equal(decode_topk(read_shard(path))[0], ids_NK)
            kl_error = [float(kl_of_stored(logprobs_NK, stored).mean()) for stored in (stored_NK, plain["logprobs"])]
            peer = "int32 + float16, zstd"
            rows += [
                Row(f"{name}: size", "bytes/token", sizes[0], peer, sizes[1]),
                Row(f"{name}: KL error", "nats", kl_error[:1], peer, kl_error[1:]),
                Row(f"{name}: encode", "tokens/s", *_rates(num_tokens, encoding, peer)),
                Row(f"{name}: decode", "tokens/s", *_rates(num_tokens, decoding, peer)),
            ]
    return rows


def _rates(count, seconds, peer):
    return rates(count, seconds[0]), peer, rates(count, seconds[1])
