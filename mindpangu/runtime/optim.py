"""AdamW with decoupled weight decay (arXiv:1711.05101), clipping by global norm, and the learning-rate schedule."""

import math

import mindspore as ms
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from ..ops.adamw import adamw
from .distributed import chunk_of


def learning_rate(step, num_steps, train):
    """Learning rate of optimizer step `step` (0-based): linear warm-up, then a cosine from train.lr to train.min_lr.

    The cosine ends at train.decay_steps, or with the run where that is 0; train.min_lr stays after it. A run that is a
    later phase begins at train.first_step of the schedule.
    """
    step += train.first_step
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    progress = (step - train.warmup_steps) / max(1, (train.decay_steps or num_steps) - train.warmup_steps)
    return train.min_lr + 0.5 * (train.lr - train.min_lr) * (1 + math.cos(math.pi * min(1.0, progress)))


class AdamW(nn.Cell):
    """Updates its parameters in place; the moments are Parameters m.* and v.* in train.moments_dtype.

    exchange: the distributed.Exchange that sums the gradients, or None. Where it splits them, this rank has the moments
    and a copy of the weights, flat, of its chunks alone: it updates those, and WeightSharing has to follow.

    The bias correction is folded into the learning rate, epsilon and decay that `hyperparameters` gives, which leaves
    the update exactly p -= lr * ((m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay * p).
    """

    def __init__(self, parameters, train, exchange=None):
        super().__init__()
        self.parameters_ = ParameterTuple(parameters)
        self.exchange = exchange if exchange is not None and exchange.shards else None
        self.updated = self.parameters_
        if self.exchange is not None:
            self.updated = ParameterTuple([Parameter(self.chunk(p), name=f"chunk.{p.name}") for p in parameters])

        dtype = getattr(ms, train.moments_dtype)

        def zeros(kind):
            return ParameterTuple([Parameter(ops.zeros(chunk.shape, dtype), name=f"{kind}.{p.name}")
                                   for p, chunk in zip(parameters, self.updated, strict=True)])

        self.m, self.v = zeros("m"), zeros("v")
        self.decays = Tensor([float(p.ndim > 1) for p in parameters], ms.float32)  # none on norms and biases
        self.train_config = train

    def chunk(self, parameter):
        return Tensor(chunk_of(parameter.asnumpy(), self.exchange.rank, self.exchange.size))

    def take_weights(self):
        """The parameters have been set from elsewhere."""
        if self.exchange is not None:
            for chunk, parameter in zip(self.updated, self.parameters_, strict=True):
                ops.assign(chunk, self.chunk(parameter))

    def hyperparameters(self, step, lr):
        """Tensor [lr, beta1, beta2, eps, weight decay] of 0-based update `step`, with the bias correction folded in."""
        train = self.train_config
        correction1 = 1 - train.beta1 ** (step + 1)
        root = math.sqrt(1 - train.beta2 ** (step + 1))
        return Tensor([lr * root / correction1, train.beta1, train.beta2, train.eps * root,
                       train.weight_decay * correction1 / root], ms.float32)

    def construct(self, grads, scale, hyperparameters_5):
        """One update with grads * scale. Returns a tensor to depend on."""
        return adamw(self.updated, self.m, self.v, grads, scale, hyperparameters_5, self.decays)


class WeightSharing(nn.Cell):
    """Sets the parameters of a sharded AdamW to all ranks' chunks. A graph of its own, behind that of the update: in
    one graph the chunks would be read before."""

    def __init__(self, optimizer):
        super().__init__()
        self.exchange, self.chunks, self.parameters_ = optimizer.exchange, optimizer.updated, optimizer.parameters_

    def construct(self):
        full = self.exchange.gather(self.chunks)
        for i in range(len(full)):
            ops.assign(self.parameters_[i], full[i])
        return full[0]
