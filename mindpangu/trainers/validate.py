"""What a model is worth on held-out examples: its loss, and the accuracy of its answers where they can be verified."""

import mindspore as ms
import numpy as np
from mindspore import Tensor

from ..data.batches import PackedBatches
from ..data.chat import decode_response
from ..rewards.score import Response


class HeldoutLoss:
    """Mean loss and metrics of a loss function over samples, each counted once."""

    def __init__(self, loss_fn, metric_names, samples, *, seq_len, num_rows, pad_id, mode="graph"):
        batches = PackedBatches(samples, seq_len=seq_len, rows_per_step=num_rows, micro_batch_rows=num_rows,
                                pad_id=pad_id, seed=0)
        self.metric_names = tuple(metric_names)
        self.loss_fn = ms.jit(loss_fn) if mode == "graph" else loss_fn
        self.batches = []
        for i in range(batches.steps_per_epoch):
            batch = next(batches)
            # The last batch is filled with rows that were seen: they don't count again.
            real_tokens = (batches.num_rows - i * num_rows) * seq_len
            weights = batch.loss_weights_AS * (batch.target_index_AS < real_tokens)
            arrays = batch._replace(loss_weights_AS=weights.astype(np.float32)).arrays()
            self.batches.append([Tensor(array[0]) for array in arrays])

    def measure(self):
        """{"loss": mean, metric: mean...} in nats per target."""
        loss, metrics = 0.0, 0.0
        for arrays in self.batches:
            loss_sum, metric_sums = self.loss_fn(*arrays)
            loss += float(loss_sum.asnumpy())
            metrics = metrics + metric_sums.asnumpy().astype(np.float64)
        return {"loss": loss / metrics[0]} | {name: metrics[i + 1] / metrics[0]
                                              for i, name in enumerate(self.metric_names)}


def measure_accuracy(generator, tokenizer, prompts, examples, are_correct, num_shown=20):
    """Greedy answers, judged by are_correct(examples, responses) -> [bool].

    Returns {"accuracy", "truncated"} as shares, and the first num_shown as dictionaries for the report.
    """
    answers = generator.generate(prompts)
    messages = [decode_response(tokenizer, answer.tokens) for answer in answers]
    responses = [Response(message.content, message.thoughts, not answer.truncated, len(answer.tokens))
                 for message, answer in zip(messages, answers, strict=True)]
    correct = are_correct(examples, responses)
    shown = [{"prompt": tokenizer.decode(prompts[i]), "answer": tokenizer.decode(answers[i].tokens),
              "value": examples[i].value, "correct": bool(correct[i]), "truncated": answers[i].truncated}
             for i in range(min(num_shown, len(answers)))]
    truncated = sum(answer.truncated for answer in answers)
    return {"accuracy": sum(correct) / len(answers), "truncated": truncated / len(answers)}, shown
