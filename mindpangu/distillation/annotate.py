"""The teacher's top-k log-probabilities of every supervised token, as shards bound to what they were made from.

T tokens of a row, S target slots, C positions of a chunk, V vocabulary, K top-k.
"""

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from ..data.batches import Samples
from ..data.pack import pack_best_fit
from .cache import decode_topk, encode_topk


class Annotator:
    """A teacher ready to score samples; the logits of at most chunk_size positions exist at a time."""

    def __init__(self, model, *, top_k, row_len, num_rows, chunk_size, mode="graph"):
        config = model.config
        if top_k > config.vocab_size:
            raise ValueError(f"kd.top_k={top_k} exceeds the teacher's vocabulary of {config.vocab_size}.")
        self.vocab_size, self.pad_id, self.top_k = config.vocab_size, config.pad_id, top_k
        self.row_len, self.num_rows, self.chunk_size = row_len, num_rows, chunk_size

        def hidden_states(tokens_T, positions_T, cu_seqlens_C):
            return model(tokens_T, positions_T, cu_seqlens_C, row_len)

        def score(hidden_TD, target_index_C, labels_C):
            logits = ops.cast(model.logits(ops.gather(hidden_TD, target_index_C, 0)), ms.float32)
            logprobs = ops.log_softmax(logits, -1)
            top_logprobs, top_ids = ops.topk(logprobs, top_k)
            label_logprobs = ops.gather_d(logprobs, 1, ops.expand_dims(labels_C, 1)).reshape(-1)
            return ops.cast(top_ids, ms.int32), top_logprobs, label_logprobs

        self.hidden_states = ms.jit(hidden_states) if mode == "graph" else hidden_states
        self.score = ms.jit(score) if mode == "graph" else score

    def top_logprobs(self, samples):
        """ids_NK int32, logprobs_NK and label_logprobs_N float32 of all N targets, in their order in `samples`.

        Log-probabilities are natural, at temperature 1 and with respect to the whole vocabulary. Raises ValueError for
        a sample longer than a row.
        """
        lengths = np.diff(samples.offsets)
        targets_before = np.concatenate([[0], np.cumsum(samples.is_target)])[samples.offsets]
        num_targets = int(targets_before[-1])
        ids = np.zeros((num_targets, self.top_k), np.int32)
        logprobs = np.zeros((num_targets, self.top_k), np.float32)
        label_logprobs = np.zeros(num_targets, np.float32)
        order, row_starts = pack_best_fit(lengths, self.row_len)
        for first_row in range(0, len(row_starts) - 1, self.num_rows):
            self._score_rows(samples, order, row_starts[first_row:first_row + self.num_rows + 1], targets_before,
                             (ids, logprobs, label_logprobs))
        return ids, logprobs, label_logprobs

    def _score_rows(self, samples, order, row_starts, targets_before, results):
        num_tokens = self.num_rows * self.row_len
        tokens = np.full(num_tokens, self.pad_id, np.int32)
        positions = np.zeros(num_tokens, np.int32)
        document_starts, index, slots = [0], [], []
        for row in range(self.num_rows):
            at = row * self.row_len
            if row < len(row_starts) - 1:
                for sample in order[row_starts[row]:row_starts[row + 1]]:
                    span = slice(samples.offsets[sample], samples.offsets[sample + 1])
                    length = span.stop - span.start
                    tokens[at:at + length] = samples.tokens[span]
                    positions[at:at + length] = np.arange(length)
                    targets = np.flatnonzero(samples.is_target[span])
                    index.append(at + targets - 1)
                    slots.append(targets_before[sample] + np.arange(len(targets)))
                    document_starts.append(at)
                    at += length
            document_starts.append(at)
            rest = (row + 1) * self.row_len - at
            positions[at:at + rest] = np.arange(rest)
        # As many documents as there can be: the graph has one shape.
        ends = np.full(num_tokens // 2 + self.num_rows + 2, num_tokens, np.int64)
        starts = np.unique(np.array([*document_starts, num_tokens]))
        ends[:len(starts)] = starts
        index, slots = np.concatenate(index).astype(np.int32), np.concatenate(slots)
        hidden = self.hidden_states(Tensor(tokens), Tensor(positions), Tensor(ends))
        for first in range(0, len(index), self.chunk_size):
            part = slice(first, first + self.chunk_size)
            padded = np.zeros(self.chunk_size, np.int32)
            padded[:len(index[part])] = index[part]
            labels = np.zeros(self.chunk_size, np.int32)
            labels[:len(index[part])] = tokens[index[part] + 1]
            scored = self.score(hidden, Tensor(padded), Tensor(labels))
            for result, array in zip(results, scored, strict=True):
                result[slots[part]] = array.asnumpy()[:len(index[part])]


def annotate(annotator, samples_of, shards, reporter=None):
    """Fill the missing shards of a ShardFolder; samples_of(i) -> Samples of shard i, without extras.

    A shard holds the samples and, under "topk.", the codec's arrays, which stand for them: nothing else is needed to
    train. Every shard is made by itself, so a killed run that is started again writes the same bytes.
    """
    for shard in shards.missing():
        samples = samples_of(shard)
        ids, logprobs, label_logprobs = annotator.top_logprobs(samples)
        labels = samples.tokens[samples.is_target]
        coded = encode_topk(ids, logprobs, labels, label_logprobs, annotator.vocab_size)
        shards.write(shard, {"tokens": samples.tokens, "offsets": samples.offsets,
                             "is_target": np.packbits(samples.is_target),
                             **{f"topk.{name}": array for name, array in coded.items()}})
        if reporter:
            reporter.advance(shards.num_shards - len(shards.missing()))


def read_annotated(shards):
    """Samples of all shards, with extras teacher_ids [num_targets, K] and teacher_logprobs [num_targets, K]."""
    parts = []
    for arrays in shards.read_all():
        is_target = np.unpackbits(arrays["is_target"], count=len(arrays["tokens"])).astype(bool)
        ids, logprobs, _ = decode_topk({name[5:]: a for name, a in arrays.items() if name.startswith("topk.")})
        parts.append(Samples(arrays["tokens"], arrays["offsets"], is_target,
                             {"teacher_ids": ids, "teacher_logprobs": logprobs}))
    starts = np.cumsum([0] + [len(part.tokens) for part in parts])
    return Samples(
        np.concatenate([part.tokens for part in parts]),
        np.concatenate([[0], *(part.offsets[1:] + start for part, start in zip(parts, starts, strict=False))]),
        np.concatenate([part.is_target for part in parts]),
        {name: np.concatenate([part.extras[name] for part in parts]) for name in parts[0].extras})
