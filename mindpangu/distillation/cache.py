"""The cache's codec: the teacher's top-k log-probabilities of supervised tokens as a few small arrays for a shard.

| array | dtype | content | bytes per token |
|---|---|---|---|
| sizes | int64 [4] | format version, vocab_size, N, K | 0.00 |
| vocab | uint8 [4, U] | the U ids that occur, by octave of frequency rank, ascending within one: differences | 0.49 |
| octaves | uint8 [K, N] | octave of the id's frequency rank: floor(log2(rank + 1)) | 4.36 |
| offsets | uint8 | rank + 1 - 2**octave in `octave` bits each, in the order of octaves | 5.40 |
| drops | uint8 [K, N] | row 0: tail code; row i: level of token i minus level of token i - 1 | 6.36 |
| label_ranks | uint8 (K > 255: wider) [N] | the label's place in the top-k, K if it is not among them | 0.35 |
| label_levels | uint8 [M] | level of the M labels outside the top-k | 0.24 |

Measured on disk: k = 10, 16000 tokens, vocabulary 153376, tools/bench_data.py's Zipf 1.15 teacher: 17.2 in all (17.6 in
shards of 4000 tokens, 19.5 of 500).

Ids. Octave and offset are the Elias gamma code split in two: the octaves are a plane of few values that zstd packs,
the offset within an octave is nearly uniform and stays plain bits, which loses 0.03 bits per id on a Zipf distribution.
Ids take 10.2 bytes per token so; with octaves of the id itself instead of its frequency rank 22.7 if the vocabulary
isn't in order of frequency (10.0 if it is); zstd over planes of the int32 ids 18.9.

Log-probabilities. Three parts, so that the stored row is a distribution by construction and the parts' errors add:
- tail mass t = 1 - sum(p): asin(sqrt(t)) in 256 levels, KL error (pi / 512)**2 / 6 = 6e-6 on average whatever t is. Its
  lowest level stands for 3e-6, so the tail is positive and float32 rounding can't lift a row's sum above 1.
- each p_i relative to the most likely p_0: level of ln(p_0 / p_i) in one table of 256 levels. Down to 5.5 nats steps of
  1/128 in sqrt(p_i / p_0), i.e. 1/64 nat at the top and 1/4 nat at the bottom, then steps of 1/4 nat to 39.3 nats.
  Square roots spread the KL error evenly over the ids: p_0 / (6 * 128**2) each, so at k = 10 and p_0 near 1 about 1e-4
  in the mean, and less where p_0 is smaller (4e-5 on the teachers of tools/bench_data.py).
- their common factor follows from the sum.
A log-probability more than LOWEST = 39.3 nats under the row's first, -inf included, is stored as that much under it:
finite. A label outside the top-k is stored in the same levels, at most as likely as the row's first. The K ids together
hold at least 3e-6, also where less is given.
"""
# N supervised tokens, K teacher top-k, V vocabulary, U distinct ids of a shard, M labels outside the top-k

import numpy as np

FORMAT_VERSION = 1
_STEPS = 128  # steps of sqrt(p_i / p_0) between 0 and 1
_COARSEST_NATS = 0.25
_TAIL_STEP = np.pi / 2 / 255


def _level_table():
    roots = np.arange(_STEPS, 0, -1) / _STEPS
    fine = -2 * np.log(roots)
    fine = fine[: int(np.argmax(np.diff(fine) > _COARSEST_NATS)) + 1]
    coarse = fine[-1] + _COARSEST_NATS * np.arange(1, 256 - fine.size + 1)
    return np.concatenate([fine, coarse])


_LEVELS = _level_table()  # nats below the row's first log-probability, float64 [256]
_BETWEEN = (_LEVELS[1:] + _LEVELS[:-1]) / 2
LOWEST = float(_LEVELS[-1])


def encode_topk(ids_NK, logprobs_NK, label_ids_N, label_logprobs_N, vocab_size):
    """Packs the teacher's top-k of N supervised tokens into arrays for write_shard; decode_topk reverses it.

    ids_NK: int32, the teacher's K most likely tokens, most likely first (ties in any order, which is kept).
    logprobs_NK: float32, natural log, temperature 1, with respect to the whole vocabulary.
    label_ids_N, label_logprobs_N: the label and the teacher's log-probability of it; where the label is among the top-k
    its log-probability is the one stored there.
    Raises ValueError for shapes that do not fit, ids outside the vocabulary, NaN, rising rows and rows that sum to more
    than 1 in probability (bare logits).
    """
    ids_NK, label_ids_N = np.asarray(ids_NK, np.int64), np.asarray(label_ids_N, np.int64)
    logprobs_NK = np.asarray(logprobs_NK, np.float32).astype(np.float64)
    label_logprobs_N = np.asarray(label_logprobs_N, np.float32).astype(np.float64)
    _check_topk(ids_NK, logprobs_NK, label_ids_N, label_logprobs_N, vocab_size)
    num_tokens, num_kept = ids_NK.shape

    # The floor is for rows that are -inf throughout, where differences would be NaN.
    first_N = np.maximum(logprobs_NK[:, 0], -1e4)
    below_KN = np.maximum(first_N - logprobs_NK.T, 0)
    levels_KN = np.searchsorted(_BETWEEN, below_KN).astype(np.uint8)
    drops_KN = np.diff(levels_KN, axis=0, prepend=0).astype(np.uint8)
    tail_N = np.clip(1 - np.exp(logprobs_NK).sum(1), 0, 1)
    drops_KN[0] = np.rint(np.arcsin(np.sqrt(tail_N)) / _TAIL_STEP)

    is_label_NK = ids_NK == label_ids_N[:, None]
    label_ranks_N = np.where(is_label_NK.any(1), is_label_NK.argmax(1), num_kept)
    outside = label_ranks_N == num_kept
    label_below_M = np.maximum(first_N[outside] - label_logprobs_N[outside], 0)

    counts_V = np.bincount(ids_NK.ravel(), minlength=1)
    used_U = np.flatnonzero(counts_V)
    by_frequency_U = used_U[np.argsort(-counts_V[used_U], kind="stable")]
    octave_U = _octaves(by_frequency_U.size)
    by_octave_U = by_frequency_U[np.lexsort((by_frequency_U, octave_U))]
    rank_of_V = np.zeros(counts_V.size, np.int64)
    rank_of_V[by_octave_U] = np.arange(by_octave_U.size)
    ranks_KN = rank_of_V[ids_NK.T]
    octaves_KN = octave_U[ranks_KN]
    # Falling back to the start of the vocabulary at each octave is a step modulo 2**32.
    steps_U = np.diff(by_octave_U, prepend=0).astype(np.uint32)
    return {
        "sizes": np.array([FORMAT_VERSION, vocab_size, num_tokens, num_kept], np.int64),
        "vocab": steps_U.astype("<u4").view(np.uint8).reshape(-1, 4).T,
        "octaves": octaves_KN,
        "offsets": _pack_bits(ranks_KN.ravel() + 1, octaves_KN.ravel()),
        "drops": drops_KN,
        "label_ranks": label_ranks_N.astype(np.min_scalar_type(num_kept)),
        "label_levels": np.searchsorted(_BETWEEN, label_below_M).astype(np.uint8),
    }


def decode_topk(arrays):
    """Returns (ids_NK int32, logprobs_NK float32, label_logprobs_N float32), rows in the order they were given.

    Log-probabilities do not rise within a row, are finite, and sum to less than 1 in probability; the rest is the tail.
    """
    version, _, num_tokens, num_kept = (int(size) for size in arrays["sizes"])
    if version != FORMAT_VERSION:
        raise ValueError(f"top-k cache format {version}, expected {FORMAT_VERSION}: annotate again with this version.")
    steps_U = np.ascontiguousarray(arrays["vocab"].T).view("<u4").ravel()
    ids_U = np.cumsum(steps_U, dtype=np.uint32).astype(np.int32)
    octaves_KN = arrays["octaves"]
    ranks = _unpack_bits(arrays["offsets"], octaves_KN.ravel()) - 1
    ids_KN = ids_U[ranks].reshape(num_kept, num_tokens)

    levels_KN = arrays["drops"].copy()
    tail_N = np.sin(levels_KN[0] * _TAIL_STEP) ** 2
    # The ends stand for the mean of t over their half step, theta**2 with theta up to _TAIL_STEP / 2.
    tail_N = np.clip(tail_N, _TAIL_STEP**2 / 12, 1 - _TAIL_STEP**2 / 12)
    levels_KN[0] = 0
    np.cumsum(levels_KN, axis=0, dtype=np.uint8, out=levels_KN)
    ratios = np.exp(-_LEVELS)
    first_N = np.log1p(-tail_N) - np.log(ratios[levels_KN].sum(0))
    logprobs_KN = (first_N - _LEVELS[levels_KN]).astype(np.float32)

    label_ranks_N = arrays["label_ranks"].astype(np.int64)
    label_logprobs_N = np.empty(num_tokens, np.float32)
    inside = label_ranks_N < num_kept
    label_logprobs_N[inside] = logprobs_KN[label_ranks_N[inside], np.flatnonzero(inside)]
    label_logprobs_N[~inside] = first_N[~inside] - _LEVELS[arrays["label_levels"]]
    return np.ascontiguousarray(ids_KN.T), np.ascontiguousarray(logprobs_KN.T), label_logprobs_N


def _octaves(size):
    """floor(log2(rank + 1)) for the ranks 0 .. size - 1, uint8."""
    return (np.frexp(np.arange(1, size + 1))[1] - 1).astype(np.uint8)


def _pack_bits(values, widths):
    """The lowest widths[i] bits of values[i], least significant first, one after the other; uint8."""
    widths = widths.astype(np.int64)
    starts = np.cumsum(widths) - widths
    shifts = (np.arange(int(widths.sum())) - np.repeat(starts, widths)).astype(np.uint8)
    bits = (np.repeat(values.astype(np.uint32), widths) >> shifts) & 1
    return np.packbits(bits.astype(np.uint8), bitorder="little")


def _unpack_bits(packed, widths):
    """Reverses _pack_bits; bit widths[i] of each value, its highest, comes back set. Widths up to 24."""
    starts = np.cumsum(widths, dtype=np.int64) - widths
    # Every value lies in the 4 bytes from its first bit's byte on; the padding lets the last ones read past the end.
    padded = np.concatenate([packed, np.zeros(4, np.uint8)])
    words = np.ndarray(padded.size - 3, "<u4", padded, strides=(1,))
    top = np.uint32(1) << widths.astype(np.uint32)
    return ((words[starts >> 3] >> (starts & 7).astype(np.uint32)) & (top - 1)) | top


def _check_topk(ids_NK, logprobs_NK, label_ids_N, label_logprobs_N, vocab_size):
    shapes = ids_NK.shape, logprobs_NK.shape, label_ids_N.shape, label_logprobs_N.shape
    if ids_NK.ndim != 2 or shapes[1] != shapes[0] or not shapes[2] == shapes[3] == shapes[0][:1]:
        raise ValueError(f"shapes of ids, logprobs, label ids, label logprobs {shapes}: expected [N, K] and [N] twice.")
    if not 1 <= ids_NK.shape[1] <= vocab_size:
        raise ValueError(f"kd.top_k={ids_NK.shape[1]}: expected 1 to vocab_size={vocab_size}.")
    for name, ids in (("teacher", ids_NK), ("label", label_ids_N)):
        if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
            raise ValueError(
                f"{name} ids from {ids.min()} to {ids.max()}: expected 0 to {vocab_size - 1}; use a teacher and a "
                "tokenizer of one vocabulary."
            )
    if np.isnan(logprobs_NK).any() or np.isnan(label_logprobs_N).any():
        raise ValueError("the teacher's log-probabilities hold NaN: check the teacher's weights and precision.")
    if (logprobs_NK[:, 1:] > logprobs_NK[:, :-1]).any():
        raise ValueError("the teacher's log-probabilities rise within a row: expected the most likely token first.")
    # A float32 log-softmax over 153376 tokens stays within 1e-4 of 1.
    mass = np.exp(logprobs_NK.clip(max=100)).sum(1).max(initial=0)
    if mass > 1.001:
        raise ValueError(
            f"a row's top-k probabilities sum to {mass:.4g}, more than 1: expected log-probabilities with respect to "
            "the whole vocabulary at temperature 1, not logits."
        )
