"""What a model is worth on held-out examples: its loss, and the accuracy of its answers where they can be verified."""

import mindspore as ms
import numpy as np
from mindspore import Tensor

from ..data.batches import PackedBatches, split_sequence
from ..data.chat import decode_response
from ..rewards.score import Response


class HeldoutLoss:
    """Mean loss and metrics of a loss function over samples, each counted once, by all ranks together."""

    def __init__(self, loss_fn, metric_names, samples, *, seq_len, num_rows, pad_id, ranks, mode="graph"):
        batches = PackedBatches(samples, seq_len=seq_len, rows_per_step=num_rows, micro_batch_rows=num_rows,
                                pad_id=pad_id, seed=0)
        self.metric_names = tuple(metric_names)
        self.loss_fn = ms.jit(loss_fn) if mode == "graph" else loss_fn
        self.batches, self.world = [], ranks.world
        for i in range(batches.steps_per_epoch):
            batch = next(batches)
            if i % ranks.num_data != ranks.data_rank:
                continue
            # The last batch is filled with rows that were seen: they don't count again.
            real_tokens = (batches.num_rows - i * num_rows) * seq_len
            weights = batch.loss_weights_AS * (batch.target_index_AS < real_tokens)
            arrays = batch._replace(loss_weights_AS=weights.astype(np.float32)).arrays()
            if ranks.num_sequence > 1:
                arrays = split_sequence(arrays, ranks.sequence_rank, ranks.num_sequence)
            self.batches.append([Tensor(array[0]) for array in arrays])

    def measure(self):
        """{"loss": mean, metric: mean...} in nats per target."""
        sums = np.zeros(2 + len(self.metric_names))
        for arrays in self.batches:
            loss_sum, metric_sums = self.loss_fn(*arrays)
            sums += np.append(loss_sum.asnumpy(), metric_sums.asnumpy()).astype(np.float64)
        loss, *metrics = np.sum(self.world.gather("held-out loss", sums.tolist()), 0)
        return {"loss": loss / metrics[0]} | {name: metrics[i + 1] / metrics[0]
                                              for i, name in enumerate(self.metric_names)}


def measure_accuracy(generator, tokenizer, prompts, examples, are_correct, world, num_shown=20):
    """Greedy answers, judged by are_correct(examples, responses) -> [bool]; each rank answers its share of the prompts.

    Returns {"accuracy", "truncated"} as shares, and the first num_shown as dictionaries for the report.
    """
    own = [(answer.tokens.tolist(), bool(answer.truncated))
           for answer in generator.generate(prompts[world.rank::world.size])]
    shares = world.gather("answers", own)
    answers = [shares[i % world.size][i // world.size] for i in range(len(prompts))]
    messages = [decode_response(tokenizer, tokens) for tokens, _ in answers]
    responses = [Response(message.content, message.thoughts, not truncated, len(tokens))
                 for message, (tokens, truncated) in zip(messages, answers, strict=True)]
    correct = world.on_main("judge answers", lambda: [bool(c) for c in are_correct(examples, responses)])
    shown = [{"prompt": tokenizer.decode(prompts[i]), "answer": tokenizer.decode(answers[i][0]),
              "value": examples[i].value, "correct": correct[i], "truncated": answers[i][1]}
             for i in range(min(num_shown, len(answers)))]
    truncated = sum(truncated for _, truncated in answers)
    return {"accuracy": sum(correct) / len(answers), "truncated": truncated / len(answers)}, shown
