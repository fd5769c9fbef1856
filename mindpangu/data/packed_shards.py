"""Packed training rows on disk, in training order: written once by many processes, read by a trainer shard by shard.

A folder is a `shards.ShardFolder`. Shard s holds the s-th samples_per_shard samples, packed best-fit among themselves,
so that the order of a mixture, or of a curriculum from easy to hard, survives from shard to shard:

| array | content |
|---|---|
| tokens | int32, of all samples, one after the other, row after row |
| is_target | bool, as many: this token is predicted with loss |
| lengths | int32, tokens of each sample |
| row_samples | int32, samples of each row |

The manifest has the numbers of every shard (`ShardCounts`), so that a trainer knows the shapes of its arrays without
reading any.
"""

# N samples, R rows, A micro-batches per step
import contextlib
import functools
import multiprocessing
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mindpangu.data.batches import (
    PackedRows,
    RowStream,
    Samples,
    check_batch_rows,
    shuffled,
    split_document,
    tokenized_to_samples,
)
from mindpangu.data.pack import pack_best_fit
from mindpangu.data.parallel import map_pieces, worker_processes
from mindpangu.data.shards import ShardFolder, write_shard

SHARD_TOKENS = 1 << 24  # more or less, of the largest that are made


class ShardCounts(NamedTuple):
    """What a shard holds. max_documents and max_targets: of a row; padding at a row's end is a document too."""

    rows: int
    samples: int
    tokens: int
    targets: int
    dropped: int
    max_documents: int
    max_targets: int


def bound_samples(samples_per_shard, mean_tokens):
    """samples_per_shard, or fewer: what has SHARD_TOKENS tokens, for a process holds a shard some four times."""
    return min(samples_per_shard, max(1, int(SHARD_TOKENS / max(1, mean_tokens))))


def write_packed(folder, num_samples, tokenize, *, seq_len, pad_id, samples_per_shard, binding, on_long="drop",
                 num_processes=1, workers=None, on_progress=None):
    """Writes the folder, or what is missing of it, and returns its PackedShards.

    tokenize(first, end) -> [(tokens_T int32, is_target_T bool)]: samples first to end - 1 of the num_samples in
    training order, whole and the same each time; a document that a mixture has twice is two samples.
    seq_len: tokens of a row. on_long: longer samples are dropped and counted ("drop", for conversations) or cut into
    pieces of seq_len ("split", for plain text, see `batches.documents_to_samples`).
    binding: dict[str, str], what the tokens were made from: at least "tokenizer" and "template", the digests, and what
    identifies the samples and their order. on_progress(shards done, shards in all) is called after every shard.
    num_processes: the bytes don't depend on it. Above 1, tokenize has to be picklable and the caller's main module
    importable. workers: an executor of so many processes, see parallel.worker_processes; None: one of its own.
    Killed, it goes on by the same call. One writer at a time.
    Raises ValueError for samples that cannot be trained on, by their numbers, and if the folder holds others.
    """
    if on_long not in ("drop", "split"):
        raise ValueError(f"on_long={on_long!r}: expected 'drop' or 'split'.")
    if min(num_samples, seq_len, samples_per_shard, num_processes) < 1:
        raise ValueError(f"num_samples={num_samples}, seq_len={seq_len}, samples_per_shard={samples_per_shard}, "
                         f"num_processes={num_processes}: expected at least 1 of each.")
    missing_keys = {"tokenizer", "template"} - binding.keys()
    assert not missing_keys, f"binding lacks {missing_keys}"
    binding = {**binding, "seq_len": str(seq_len), "pad_id": str(pad_id), "on_long": on_long,
               "num_samples": str(num_samples), "samples_per_shard": str(samples_per_shard)}
    shards = ShardFolder.open(folder, binding, -(-num_samples // samples_per_shard))
    shards.remove_leftovers()
    missing = shards.missing()
    num_done = shards.num_shards - len(missing)
    job = (str(folder), tokenize, num_samples, seq_len, samples_per_shard, on_long)
    num_processes = min(num_processes, len(missing))
    own = worker_processes(num_processes) if num_processes > 1 and workers is None else None
    with own or contextlib.nullcontext(workers if num_processes > 1 else None) as workers:
        for i, file, digest, counts in map_pieces(workers, functools.partial(_write, job), missing, num_processes):
            shards.take_file(i, file, digest, **counts._asdict())
            num_done += 1
            if on_progress:
                on_progress(num_done, shards.num_shards)
    return PackedShards(folder)


def pack_samples(tokenized, seq_len, on_long="drop", first=0):
    """(arrays of a shard, its ShardCounts) of [(tokens_T, is_target_T)]; see `write_packed`.

    first: the number of the first sample, for errors.
    """
    kept, num_dropped = [], 0
    for number, (tokens_T, is_target_T) in enumerate(tokenized, start=first):
        is_target_T = np.asarray(is_target_T, bool)
        if not is_target_T[1:].any() or is_target_T[0]:
            raise ValueError(f"sample {number} of {len(is_target_T)} tokens: expected at least one supervised token, "
                             "which is never the first; leave such samples out.")
        if len(tokens_T) <= seq_len:
            kept.append((tokens_T, is_target_T))
        elif on_long == "drop":
            num_dropped += 1
        else:
            kept += [piece for piece in split_document(tokens_T, is_target_T, seq_len) if piece[1].any()]
    order_N, row_starts_R1 = pack_best_fit([len(tokens_T) for tokens_T, _ in kept], seq_len)
    samples = tokenized_to_samples([kept[n] for n in order_N])
    lengths, row_samples = np.diff(samples.offsets), np.diff(row_starts_R1)
    arrays = {"tokens": samples.tokens, "is_target": samples.is_target, "lengths": lengths.astype(np.int32),
              "row_samples": row_samples.astype(np.int32)}
    if not kept:
        return arrays, ShardCounts(0, 0, 0, 0, num_dropped, 0, 0)
    starts = samples.offsets[row_starts_R1]
    row_targets = np.add.reduceat(samples.is_target, starts[:-1], dtype=np.int64)
    documents = row_samples + (np.diff(starts) < seq_len)
    return arrays, ShardCounts(len(row_samples), len(kept), len(samples.tokens), int(row_targets.sum()), num_dropped,
                               int(documents.max()), int(row_targets.max()))


class PackedShards:
    """A complete folder of packed rows: counts (a ShardCounts per shard), read(i), binding.

    Raises ValueError if the folder is none, or lacks shards.
    """

    def __init__(self, folder):
        self._shards = shards = ShardFolder.find(folder)
        if "samples_per_shard" not in shards.binding:
            raise ValueError(f"{folder}: shards of something else than packed rows: expected a folder that "
                             "write_packed wrote.")
        missing = shards.missing()
        if missing:
            raise ValueError(f"{folder}: {len(missing)} of {shards.num_shards} shards are missing, the first "
                             f"{missing[0]}: run the command that writes it to its end.")
        self.folder, self.binding = Path(folder), shards.binding
        self.counts = [ShardCounts(*(shards.entry(i)[name] for name in ShardCounts._fields))
                       for i in range(shards.num_shards)]

    def read(self, i):
        """The arrays of shard i."""
        return self._shards.read(i)

    def check(self, *, tokenizer, template, seq_len, pad_id):
        """Raises ValueError for rows that a model with this tokenizer and template (digests) can't be trained on."""
        for name, here, advice in (
            ("tokenizer", tokenizer, "their ids would mean other tokens; write the rows with the tokenizer of the "
                                     "model, or give theirs"),
            ("template", template, "write the rows again"),
            ("seq_len", seq_len, f"set data.seq_len={self.binding['seq_len']}, or write the rows again"),
            ("pad_id", pad_id, "write the rows with the tokenizer of the model"),
        ):
            if self.binding[name] != str(here):
                raise ValueError(f"{self.folder}: its rows have {name} {self.binding[name]}, this run {here}: "
                                 f"{advice}.")


class MemoryShards:
    """The same in memory: [(tokens_T, is_target_T)] in training order, packed in shards of samples_per_shard."""

    def __init__(self, tokenized, *, seq_len, samples_per_shard, on_long="drop"):
        packed = [pack_samples(tokenized[first : first + samples_per_shard], seq_len, on_long, first)
                  for first in range(0, len(tokenized), samples_per_shard)]
        self._arrays, self.counts = [arrays for arrays, _ in packed], [counts for _, counts in packed]

    def read(self, i):
        return self._arrays[i]


class ShardBatches(RowStream):
    """An endless iterator of Batch over the rows of shards in their order, see RowStream; holds one shard at a time.

    shards: PackedShards or MemoryShards of rows of seq_len tokens. seed: within shard s the rows of epoch e are
    shuffled by (seed, e, s). The shapes are those of the largest rows of all shards. The rest as PackedBatches.
    """

    def __init__(self, shards, *, seq_len, rows_per_step, micro_batch_rows, pad_id, seed, share=(0, 1)):
        check_batch_rows(seq_len, rows_per_step, micro_batch_rows, share[1])
        self._shards, self.seq_len, self.pad_id, self.seed, self.share = shards, seq_len, pad_id, seed, share
        self.rows_per_step, self.micro_batch_rows = rows_per_step, micro_batch_rows
        counts = ShardCounts(*np.array(shards.counts, np.int64).reshape(-1, len(ShardCounts._fields)).sum(0).tolist())
        self.num_rows, self.num_samples, self.num_dropped = counts.rows, counts.samples, counts.dropped
        if not self.num_rows:
            raise ValueError(f"data.seq_len={seq_len}: all {counts.dropped} samples are longer: raise data.seq_len or "
                             "shorten the samples.")
        self.num_targets, self.fill = counts.targets, counts.tokens / (counts.rows * seq_len)
        # Padding alone is a document as well.
        self.C = 1 + micro_batch_rows * max(1, *(one.max_documents for one in shards.counts))
        self.S = -(-micro_batch_rows * max(one.max_targets for one in shards.counts) // 8) * 8
        self._row_starts = np.append(0, np.cumsum([one.rows for one in shards.counts]))  # of shards
        self._order = None, None  # of (epoch, shard)
        self._held = None, None  # shard, (arrays, token starts of its samples, sample starts of its rows)

    def _rows_of(self, epoch, first, count):
        shard = int(np.searchsorted(self._row_starts, first, side="right")) - 1
        start, end = self._row_starts[shard : shard + 2].tolist()
        if self._order[0] != (epoch, shard):
            self._order = (epoch, shard), start + shuffled(end - start, self.seed, epoch, shard)
        return self._order[1][first - start : first - start + count]

    def assemble(self, rows_AR):
        """The Batch of these rows, by their numbers over all shards."""
        rows = rows_AR.reshape(-1)
        shard_of_row = np.searchsorted(self._row_starts, rows, side="right") - 1
        tokens, is_target, lengths, row_samples = [], [], [], []
        # A step's rows are in the order of the shards, so that each is read once.
        for begin, end in _runs(shard_of_row):
            arrays, token_starts, sample_starts = self._hold(int(shard_of_row[begin]))
            for row in (rows[begin:end] - self._row_starts[shard_of_row[begin]]).tolist():
                members = slice(sample_starts[row], sample_starts[row + 1])
                span = slice(token_starts[members.start], token_starts[members.stop])
                tokens.append(arrays["tokens"][span])
                is_target.append(arrays["is_target"][span])
                lengths.append(arrays["lengths"][members])
                row_samples.append(members.stop - members.start)
        offsets = np.append(0, np.cumsum(np.concatenate(lengths), dtype=np.int64))
        samples = Samples(np.concatenate(tokens), offsets, np.concatenate(is_target), {})
        packed = PackedRows.from_rows(samples, row_samples, seq_len=self.seq_len, pad_id=self.pad_id,
                                      micro_batch_rows=self.micro_batch_rows, C=self.C, S=self.S)
        return packed.assemble(np.arange(rows.size).reshape(rows_AR.shape))

    def _hold(self, shard):
        if self._held[0] != shard:
            self._held = None, None  # before the next is read
            arrays = self._shards.read(shard)
            self._held = shard, (arrays, np.append(0, np.cumsum(arrays["lengths"], dtype=np.int64)),
                                 np.append(0, np.cumsum(arrays["row_samples"], dtype=np.int64)))
        return self._held[1]


def _runs(values):
    """[(begin, end)] of equal values in a row."""
    ends = np.flatnonzero(np.diff(values)) + 1
    return list(zip([0, *ends.tolist()], [*ends.tolist(), len(values)], strict=True))


def _write(job, i):
    folder, tokenize, num_samples, seq_len, samples_per_shard, on_long = job
    first = i * samples_per_shard
    end = min(num_samples, first + samples_per_shard)
    tokenized = tokenize(first, end)
    assert len(tokenized) == end - first
    arrays, counts = pack_samples(tokenized, seq_len, on_long, first)
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        raise SystemExit(1)  # it was killed; another start may be writing this shard
    # Named for this process: the worker of a writer that was killed may not be done when the next one starts.
    file = Path(folder, f"{i:05d}.{os.getpid()}.partial")
    return i, file, write_shard(file, arrays), counts
