"""Batches: tokenized samples, packed into rows, as a resumable stream of fixed-shape arrays; NumPy only."""

# N samples, R rows, A micro-batches per step, T tokens per micro-batch (its rows, one after the other),
# C cumulative lengths per micro-batch, S target slots per micro-batch
from typing import NamedTuple

import numpy as np

from mindpangu.data.pack import pack_best_fit


class Samples(NamedTuple):
    """The ragged arrays of a whole data set: sample n holds tokens[offsets[n]:offsets[n + 1]]."""

    tokens: np.ndarray  # int32 [sum of lengths]
    offsets: np.ndarray  # int64 [N + 1]
    is_target: np.ndarray  # bool [sum of lengths]: this token is predicted with loss; never the first of a sample
    extras: dict  # name -> [num_targets, ...]: one row per target, in the order of the targets


class Batch(NamedTuple):
    """One optimizer step. Documents are the samples of a row plus, last in the row, its padding."""

    tokens_AT: np.ndarray  # int32
    positions_AT: np.ndarray  # int32, restart at 0 in every document
    cu_seqlens_AC: np.ndarray  # int64, cumulative document ends: 0, ..., T, then T repeated
    target_index_AS: np.ndarray  # int32, index into T of the position that predicts the target (the one before it)
    labels_AS: np.ndarray  # int32, the target's token id
    loss_weights_AS: np.ndarray  # float32, 1 for a target, 0 for an unused slot (index 0, label 0)
    extras: tuple  # one [A, S, ...] array per extra, in sorted name order, zeros in unused slots

    @property
    def num_micro_batches(self):
        """How many of the A have to be computed: all."""
        return len(self.tokens_AT)

    @property
    def num_tokens(self):
        """Tokens that are computed, padding included."""
        return self.tokens_AT.size

    def arrays(self):
        """The flat positional tuple of arrays: compiled functions compile again for every NamedTuple argument."""
        return (*self[:-1], *self.extras)


def tokenized_to_samples(tokenized, extras=None):
    """Joins a list of (tokens_T, is_target_T) pairs; extras: name -> [num_targets, ...] over the whole list."""
    lengths = np.array([len(tokens_T) for tokens_T, _ in tokenized], dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.concatenate([np.zeros(0, np.int32), *(tokens_T for tokens_T, _ in tokenized)])
    is_target = np.concatenate([np.zeros(0, bool), *(is_target_T for _, is_target_T in tokenized)])
    # Of millions of tokens a copy weighs.
    tokens, is_target = tokens.astype(np.int32, copy=False), is_target.astype(bool, copy=False)
    return Samples(tokens, offsets, is_target, dict(extras or {}))


def documents_to_samples(documents, seq_len):
    """Plain documents for pre-training: every token but the first of each document is a target.

    documents: list of token id arrays. Documents longer than seq_len are cut into pieces of seq_len tokens, as is
    standard for pre-training; each piece is a document of its own, so the first token of a piece is not a target.
    Pieces of a single token predict nothing and are left out.
    """
    pieces = []
    for document in documents:
        tokens_T = np.asarray(document, dtype=np.int32)
        pieces += split_document(tokens_T, np.ones(len(tokens_T), bool), seq_len)
    return tokenized_to_samples(pieces)


def split_document(tokens_T, is_target_T, seq_len):
    """Pieces [(tokens, is_target)] of seq_len tokens, the last of fewer; see `documents_to_samples`."""
    pieces = []
    for start in range(0, len(tokens_T) - 1, seq_len):
        is_target = is_target_T[start : start + seq_len].copy()
        is_target[0] = False
        pieces.append((tokens_T[start : start + seq_len], is_target))
    return pieces


def long_samples_error(lengths_N, seq_len):
    """The ValueError about samples that do not fit in a row."""
    return ValueError(
        f"data.seq_len={seq_len}: {np.count_nonzero(lengths_N > seq_len)} of {lengths_N.size} samples are longer, the "
        f"longest sample has {lengths_N.max()} tokens; raise data.seq_len or shorten the samples."
    )


class PackedRows:
    """Samples packed into rows, to be assembled into batches of fixed shapes.

    seq_len: tokens per row; micro_batch_rows: rows per micro-batch. pad_id fills the end of a row. on_long: samples
    over seq_len are dropped and counted ("drop") or refused ("raise"); never cut. max_documents, max_targets: what C
    and S have room for in a micro-batch; default: as many as this data set needs at most. Setting them keeps the
    shapes, and so the compiled step, across data sets.
    Raises ValueError for settings or samples that cannot be used, naming the samples.
    """

    def __init__(
        self, samples, *, seq_len, micro_batch_rows, pad_id, on_long="drop", max_documents=None, max_targets=None
    ):
        if min(seq_len, micro_batch_rows) < 1:
            raise ValueError(f"seq_len={seq_len}, micro_batch_rows={micro_batch_rows}: both have to be positive.")
        if on_long not in ("drop", "raise"):
            raise ValueError(f"on_long={on_long!r}: expected 'drop' or 'raise'.")
        self.seq_len, self.micro_batch_rows, self.pad_id, self._samples = seq_len, micro_batch_rows, pad_id, samples
        lengths_N = np.diff(samples.offsets)
        targets_before = _check_samples(samples)  # [N + 1]
        kept = np.flatnonzero(lengths_N <= seq_len)
        self.num_samples, self.num_dropped = kept.size, lengths_N.size - kept.size
        if not kept.size or (self.num_dropped and on_long == "raise"):
            raise long_samples_error(lengths_N, seq_len)
        order_N, row_starts_R1 = pack_best_fit(lengths_N[kept], seq_len)
        self._hold(kept[order_N], row_starts_R1, targets_before)
        self._max_documents, self._max_targets = max_documents, max_targets
        self._set_shapes(1)

    @classmethod
    def from_rows(cls, samples, row_samples_R, *, seq_len, micro_batch_rows, pad_id, C, S):
        """Rows that are packed already: row_samples_R says how many of the samples, in their order, each holds.

        C, S: the shapes, for which there has to be room.
        """
        rows = cls.__new__(cls)
        rows.seq_len, rows.micro_batch_rows, rows.pad_id, rows._samples = seq_len, micro_batch_rows, pad_id, samples
        num_samples = samples.offsets.size - 1
        rows.num_samples, rows.num_dropped = num_samples, 0
        rows._hold(np.arange(num_samples), np.append(0, np.cumsum(row_samples_R)), _check_samples(samples))
        rows.C, rows.S = C, S
        return rows

    def _hold(self, order_N, row_starts_R1, targets_before):
        """Take the rows: row r has the samples order_N[row_starts_R1[r]:row_starts_R1[r + 1]]."""
        samples, self._order_N, self._row_starts = self._samples, order_N, row_starts_R1
        # Per sample in packed order: where its tokens and its targets start, and how many there are.
        self._token_starts, self._lengths = samples.offsets[order_N], np.diff(samples.offsets)[order_N]
        self._target_starts = targets_before[order_N]
        self._num_targets = targets_before[order_N + 1] - self._target_starts

        first = row_starts_R1[:-1]
        self.num_rows = first.size
        row_tokens = np.add.reduceat(self._lengths, first)
        self._row_targets = np.add.reduceat(self._num_targets, first)
        self._row_documents = np.diff(row_starts_R1) + (row_tokens < self.seq_len)
        self.num_targets = int(self._row_targets.sum())
        self.fill = float(row_tokens.sum() / (self.num_rows * self.seq_len))
        self._extras = tuple(samples.extras[name] for name in sorted(samples.extras))

    def _set_shapes(self, repeats):
        """C and S for micro-batches that hold a row at most `repeats` times."""
        largest = []
        for per_row in (self._row_documents, self._row_targets):
            largest.append(int(np.sort(np.repeat(per_row, repeats))[-self.micro_batch_rows :].sum()))
        # Rows that are missing in a micro-batch are one document of padding each.
        largest[0] += max(0, self.micro_batch_rows - repeats * self.num_rows)
        for name, room, needed in (
            ("max_documents", self._max_documents, largest[0]),
            ("max_targets", self._max_targets, largest[1]),
        ):
            if room is not None and needed > room:
                raise ValueError(
                    f"{name}={room}: a micro-batch of this data set has up to {needed}; raise {name} or lower "
                    "micro_batch_rows."
                )
        self.C = 1 + (largest[0] if self._max_documents is None else self._max_documents)
        self.S = -(-(largest[1] if self._max_targets is None else self._max_targets) // 8) * 8

    def assemble(self, rows_AR):
        """The Batch of these rows; -1 stands for an empty row, all padding and of no weight."""
        rows_AR = np.where(np.asarray(rows_AR) < 0, self.num_rows, rows_AR)
        row_starts = np.append(self._row_starts, self._row_starts[-1])  # the last row is the empty one
        num_micro = rows_AR.shape[0]
        num_tokens = self.micro_batch_rows * self.seq_len
        batch = Batch(
            tokens_AT=np.full((num_micro, num_tokens), self.pad_id, np.int32),
            positions_AT=np.empty((num_micro, num_tokens), np.int32),
            cu_seqlens_AC=np.full((num_micro, self.C), num_tokens, np.int64),
            target_index_AS=np.zeros((num_micro, self.S), np.int32),
            labels_AS=np.zeros((num_micro, self.S), np.int32),
            loss_weights_AS=np.zeros((num_micro, self.S), np.float32),
            extras=tuple(np.zeros((num_micro, self.S, *extra.shape[1:]), extra.dtype) for extra in self._extras),
        )
        for micro, rows in enumerate(rows_AR):
            first, num_documents = row_starts[rows], row_starts[rows + 1] - row_starts[rows]
            members = _ranges(first, num_documents)  # samples in packed order, row after row
            lengths = self._lengths[members]
            row_of_member = np.repeat(np.arange(rows.size), num_documents)
            # Start of each sample within the micro-batch: its row's start plus what stands before it in the row.
            before = np.cumsum(lengths) - lengths
            before_row = np.append(before, 0)[np.cumsum(num_documents) - num_documents]  # an empty row may come last
            starts = row_of_member * self.seq_len + before - before_row[row_of_member]
            row_ends = np.arange(1, rows.size + 1) * self.seq_len

            # Document ends: every sample's end and every row's end; where a row is full the two are the same.
            ends = np.unique(np.concatenate([starts + lengths, row_ends]))
            batch.cu_seqlens_AC[micro, 0] = 0
            batch.cu_seqlens_AC[micro, 1 : 1 + ends.size] = ends
            document_lengths = np.diff(ends, prepend=0)
            batch.positions_AT[micro] = _ranges(np.zeros_like(ends), document_lengths)

            source = _ranges(self._token_starts[members], lengths)
            place = _ranges(starts, lengths)
            tokens = self._samples.tokens[source]
            batch.tokens_AT[micro, place] = tokens
            is_target = self._samples.is_target[source]
            num_targets = int(is_target.sum())
            batch.target_index_AS[micro, :num_targets] = place[is_target] - 1
            batch.labels_AS[micro, :num_targets] = tokens[is_target]
            batch.loss_weights_AS[micro, :num_targets] = 1.0
            if self._extras:
                targets = _ranges(self._target_starts[members], self._num_targets[members])
                for extra, padded in zip(self._extras, batch.extras, strict=True):
                    padded[micro, :num_targets] = extra[targets]
        return batch


class RowStream:
    """Rows in steps over epochs without end, to be assembled into Batches; the place is three integers.

    A child has num_rows, rows_per_step, micro_batch_rows, share, _rows_of(epoch, first, count), the numbers of up to
    count rows of an epoch's order from the first-th on, at least one, and assemble(rows_AR).

    An epoch whose last step is incomplete fills it with the first rows of the next epoch's order, and the next epoch
    goes on behind them: over E epochs' worth of rows every row is seen E times.
    """

    _epoch = _row = _step = 0

    @property
    def steps_per_epoch(self):
        return -(-self.num_rows // self.rows_per_step)

    def state_dict(self):
        """The place in the stream: current epoch, rows of it already delivered, steps delivered since the start."""
        return {"epoch": self._epoch, "row": self._row, "step": self._step}

    def load_state_dict(self, state):
        """Goes to the place. Raises ValueError if the state cannot come from this data set with these settings."""
        epoch, row, step = (int(state[name]) for name in ("epoch", "row", "step"))
        if not 0 <= row < self.num_rows or epoch * self.num_rows + row != step * self.rows_per_step:
            raise ValueError(
                f"data position epoch={epoch} row={row} step={step} does not fit {self.num_rows} rows and "
                f"{self.rows_per_step} rows per step: resume with the data set, data.seq_len and batch size of the "
                "interrupted run, or start a new run."
            )
        self._epoch, self._row, self._step = epoch, row, step

    def __iter__(self):
        return self

    def take_metrics(self):
        """Numbers for the step line since the last call: none."""
        return {}

    def __next__(self):
        rows = []
        while len(rows) < self.rows_per_step:
            chosen = self._rows_of(self._epoch, self._row, self.rows_per_step - len(rows))
            rows.extend(chosen.tolist())
            self._row += chosen.size
            if self._row == self.num_rows:
                self._epoch, self._row = self._epoch + 1, 0
        self._step += 1
        i, n = self.share
        return self.assemble(np.array(rows).reshape(-1, self.micro_batch_rows)[i::n])


def check_batch_rows(seq_len, rows_per_step, micro_batch_rows, num_shares):
    """Raises ValueError for rows that can't be divided into micro-batches and shares."""
    if min(seq_len, rows_per_step, micro_batch_rows) < 1 or rows_per_step % (micro_batch_rows * num_shares):
        ranks = f" times {num_shares} ranks" if num_shares > 1 else ""
        raise ValueError(
            f"seq_len={seq_len}, rows_per_step={rows_per_step}, micro_batch_rows={micro_batch_rows}: all have to "
            f"be positive and rows_per_step a multiple of micro_batch_rows{ranks}; change one of the two."
        )


def shuffled(size, *seeds):
    """0 to size - 1 in the order that the seeds give."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seeds))).permutation(size)


class PackedBatches(RowStream, PackedRows):
    """An endless iterator of Batch over epochs, see RowStream.

    rows_per_step: rows per optimizer step, a multiple of micro_batch_rows. seed: the rows of epoch e are shuffled by
    (seed, e). share: (i, n) for the i-th of n equal shares of every step's micro-batches, one for each rank. The rest
    as PackedRows.
    Raises ValueError for settings or data that cannot be trained on, naming the samples.
    """

    def __init__(
        self, samples, *, seq_len, rows_per_step, micro_batch_rows, pad_id, seed, on_long="drop", max_documents=None,
        share=(0, 1),
    ):
        check_batch_rows(seq_len, rows_per_step, micro_batch_rows, share[1])
        super().__init__(
            samples, seq_len=seq_len, micro_batch_rows=micro_batch_rows, pad_id=pad_id, on_long=on_long,
            max_documents=max_documents,
        )
        self.rows_per_step, self.seed, self.share = rows_per_step, seed, share
        if not self._row_targets.all():
            bare = np.flatnonzero(self._row_targets == 0)
            row = bare[0]
            raise ValueError(
                f"{bare.size} of {self.num_rows} rows have no supervised token; the first holds the samples "
                f"{_listed(self._order_N[self._row_starts[row] : self._row_starts[row + 1]])}: expected at least one "
                "target per row; remove samples without an answer."
            )
        # Where epochs do not end with a micro-batch, one micro-batch holds rows of two epochs (more if the data set
        # is smaller than a micro-batch) and can hold the same row again.
        self._set_shapes(1 if self.num_rows % micro_batch_rows == 0 else 1 + -(-micro_batch_rows // self.num_rows))
        self._order = None, None  # of an epoch

    def _rows_of(self, epoch, first, count):
        if self._order[0] != epoch:
            self._order = epoch, shuffled(self.num_rows, self.seed, epoch)
        return self._order[1][first : first + count]


class _Part(NamedTuple):
    tensors: tuple
    num_micro_batches: int
    num_tokens: int

    def arrays(self):
        return self.tensors


class SequenceShare:
    """Batches of which this rank takes the part-th of num_parts shares of the tokens, see `split_sequence`."""

    def __init__(self, batches, part, num_parts):
        self.batches, self.part, self.num_parts = batches, part, num_parts
        self.state_dict, self.load_state_dict = batches.state_dict, batches.load_state_dict
        self.take_metrics = batches.take_metrics

    def __iter__(self):
        return self

    def __next__(self):
        batch = next(self.batches)
        return _Part(split_sequence(batch.arrays(), self.part, self.num_parts), batch.num_micro_batches,
                     batch.num_tokens)


def split_sequence(arrays, part, num_parts):
    """The part-th of num_parts shares of a batch's arrays: an equal piece of every micro-batch's tokens, and the
    targets that are predicted at them.

    arrays: in the order of Batch.arrays(), the weights behind the labels. Where the number of tokens is not a multiple
    of num_parts, zeros behind the last row make it one. cu_seqlens stays that of the rows' tokens. The number of target
    slots is the same for all parts: what one can have at most.
    """
    tokens_AT, positions_AT, cu_seqlens_AC, index_AS, *targets = arrays
    missing = -tokens_AT.shape[1] % num_parts
    tokens_AT, positions_AT = (np.pad(array, ((0, 0), (0, missing))) for array in (tokens_AT, positions_AT))
    num_tokens = tokens_AT.shape[1] // num_parts
    own = slice(part * num_tokens, (part + 1) * num_tokens)
    is_own_AS = (targets[1] != 0) & (index_AS >= own.start) & (index_AS < own.stop)
    # The own ones first, in their order; what follows is cleared.
    slots_AS = np.argsort(~is_own_AS, axis=1, kind="stable")[:, :min(index_AS.shape[1], -(-num_tokens // 8) * 8)]
    is_used_AS = np.take_along_axis(is_own_AS, slots_AS, 1)

    def chosen(array):
        shape = slots_AS.shape + (1,) * (array.ndim - 2)
        taken = np.take_along_axis(array, slots_AS.reshape(shape), 1)
        return np.where(is_used_AS.reshape(shape), taken, np.zeros((), array.dtype))

    index = np.where(is_used_AS, chosen(index_AS) - own.start, 0).astype(index_AS.dtype)
    return (tokens_AT[:, own], positions_AT[:, own], cu_seqlens_AC, index, *map(chosen, targets))


def _ranges(starts, lengths):
    """The ranges starts[i] .. starts[i] + lengths[i] - 1, one after the other."""
    before = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) + np.repeat(starts - before, lengths)


def _check_samples(samples):
    """Returns the number of targets before each sample, [N + 1]; raises ValueError for samples that cannot be used."""
    lengths_N = np.diff(samples.offsets)
    if not lengths_N.size:
        raise ValueError("the data set is empty: expected at least one sample; check data.train and what was skipped.")
    assert samples.offsets[0] == 0 and samples.offsets[-1] == len(samples.tokens) == len(samples.is_target)
    if (lengths_N < 1).any():
        raise ValueError(f"samples {_listed(np.flatnonzero(lengths_N < 1))} have no tokens: remove them.")
    at_start = np.flatnonzero(samples.is_target[samples.offsets[:-1]])
    if at_start.size:
        raise ValueError(
            f"samples {_listed(at_start)} have their first token as a target, which nothing in the sample predicts: "
            "expected is_target[0] == False."
        )
    num_targets_N = np.add.reduceat(samples.is_target, samples.offsets[:-1], dtype=np.int64)
    targets_before = np.concatenate([[0], np.cumsum(num_targets_N)])
    for name, extra in samples.extras.items():
        if len(extra) != targets_before[-1]:
            raise ValueError(
                f"extra {name!r} has {len(extra)} rows, the data set has {targets_before[-1]} targets: expected one "
                "row per target, in order."
            )
    return targets_before


def _listed(numbers):
    return ", ".join(map(str, numbers[:8].tolist())) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
