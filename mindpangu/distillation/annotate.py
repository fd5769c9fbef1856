"""The teacher's top-k log-probabilities of every supervised token, as shards bound to what they were made from.

T tokens of a row, S target slots, C positions of a chunk, V vocabulary, K top-k.
"""

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from ..data.batches import Samples
from ..model.logprobs import assemble_rows
from .cache import decode_topk, encode_topk


class Annotator:
    """A teacher ready to score samples; the logits of at most chunk_size positions exist at a time.

    model: a Pangu, or another Cell with its config, its hidden states when called, and its logits.
    """

    def __init__(self, model, *, top_k, row_len, num_rows, chunk_size, mode="graph"):
        config = model.config
        check_top_k(top_k, config)
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
        num_targets = int(samples.is_target.sum())
        ids = np.zeros((num_targets, self.top_k), np.int32)
        logprobs = np.zeros((num_targets, self.top_k), np.float32)
        label_logprobs = np.zeros(num_targets, np.float32)
        for arrays, slots in assemble_rows(samples, self.row_len, self.num_rows, self.pad_id):
            tokens, positions, lengths, index, labels, _ = arrays
            hidden = self.hidden_states(Tensor(tokens), Tensor(positions), Tensor(lengths))
            for first in range(0, len(slots), self.chunk_size):
                part = slots[first:first + self.chunk_size]
                # A chunk may reach into unused slots, and over the end of all.
                chunk = [np.resize(x[first:first + self.chunk_size], self.chunk_size) for x in (index, labels)]
                scored = self.score(hidden, *map(Tensor, chunk))
                for result, array in zip((ids, logprobs, label_logprobs), scored, strict=True):
                    result[part] = array.asnumpy()[:len(part)]
        return ids, logprobs, label_logprobs


def check_top_k(top_k, config):
    """Raises ValueError if a teacher of this ModelConfig has no top_k tokens."""
    if top_k > config.vocab_size:
        raise ValueError(f"kd.top_k={top_k} exceeds the teacher's vocabulary of {config.vocab_size}.")


def annotate(annotator, samples_of, shards, reporter=None):
    """Fill the missing shards of a SharedShards; samples_of(i) -> Samples of shard i, without extras.

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
            reporter.advance(shards.num_done)
    shards.finish()


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
