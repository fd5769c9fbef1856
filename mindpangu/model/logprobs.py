"""Log-probabilities of given tokens under a model, packed rows at a time; the counterpart of generate.

N targets, R rows of a call, T tokens of a call, C cumulative lengths, S target slots.
"""

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from ..data.batches import PackedRows
from ..ops.head_loss import LogprobHead


class LogprobScorer:
    """A model ready to score samples, num_rows rows of row_len tokens at a time.

    chunk_size: positions whose logits exist at a time, see ops.head_loss. temperature: the logits are divided by it.
    The compiled graph reads the model's Parameters at every call, so a scorer made before training sees the weights of
    the moment.
    """

    def __init__(self, model, *, row_len, num_rows, chunk_size, temperature=1.0, mode="graph"):
        if temperature <= 0:
            raise ValueError(f"temperature={temperature}: expected a positive number; at 0 every log-probability is 0 "
                             "or minus infinity.")
        self.row_len, self.num_rows, self.pad_id = row_len, num_rows, model.config.pad_id
        head = LogprobHead(chunk_size)

        def score_rows(tokens_T, positions_T, cu_seqlens_C, target_index_S, labels_S, weights_S):
            hidden_TD, _, _ = model.prefill(tokens_T, positions_T, cu_seqlens_C, row_len)
            hidden = ops.gather(hidden_TD, target_index_S, 0)
            if temperature != 1.0:
                hidden = hidden / temperature
            # As it is stored: the weight of a frozen bfloat16 model is not copied to float32 at every call.
            return head(hidden, model.stored_head_weight(), labels_S, weights_S)

        self._score_rows = ms.jit(score_rows) if mode == "graph" else score_rows

    def score(self, samples):
        """logprobs_N, entropies_N and is_top_N, float32, of all N targets in their order in `samples`.

        Natural log-probability of the target given the tokens before it in its sample, entropy of that distribution in
        nats, and 1 where the target is its most likely token. Raises ValueError for a sample longer than a row.
        """
        scores = np.zeros((3, int(samples.is_target.sum())), np.float32)
        for arrays, slots in assemble_rows(samples, self.row_len, self.num_rows, self.pad_id):
            outputs = self._score_rows(*map(Tensor, arrays))
            for score, output in zip(scores, outputs, strict=True):
                score[slots] = output.asnumpy()[:len(slots)]
        return tuple(scores)


def assemble_rows(samples, row_len, num_rows, pad_id):
    """Samples packed into rows, num_rows at a time, in arrays whose shapes do not depend on the samples (up to 255
    documents; with more there are few shapes).

    Yields (arrays, slots): the first six arrays of a data.batches.Batch, without their leading axis; and which of the
    samples' targets each of the first target slots is. The others are unused. Calls without targets are left out.
    Raises ValueError for a sample longer than a row.
    """
    num_targets = int(samples.is_target.sum())
    if num_targets == 0:
        return
    rows = PackedRows(samples._replace(extras={"slot": np.arange(num_targets)}), seq_len=row_len,
                      micro_batch_rows=num_rows, pad_id=pad_id, on_long="raise", max_targets=num_rows * row_len)
    # Graphs are compiled for a number of documents. Room for as many as there can be would cost the general operations
    # T^2 / 2 numbers, and Ascend's attention takes 1024.
    num_lengths = max(256, 1 << (rows.C - 1).bit_length())
    for first in range(0, rows.num_rows, num_rows):
        chosen = np.arange(first, first + num_rows)
        batch = rows.assemble(np.where(chosen < rows.num_rows, chosen, -1)[None])
        lengths = np.full(num_lengths, num_rows * row_len, np.int64)
        lengths[:rows.C] = batch.cu_seqlens_AC[0]
        slots = batch.extras[0][0][batch.loss_weights_AS[0] > 0]
        if len(slots):
            yield (batch.tokens_AT[0], batch.positions_AT[0], lengths, batch.target_index_AS[0], batch.labels_AS[0],
                   batch.loss_weights_AS[0]), slots
