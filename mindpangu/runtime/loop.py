"""THE training step and the loop around it. Knows no model, loss or data set.

Contract of a loss function: loss_fn(*tensors) -> (loss_sum, metric_sums_M) on one micro-batch, where metric_sums_M[0]
is the sum of the loss weights and the rest are weighted sums too. The loss is sum(w * l) / sum(w) over all
micro-batches and ranks, so how a batch is split never changes a gradient; all averaging policy lives in the weights. A
policy loss divides by weights of its own (see trainers.grpo): then metric_sums_M[0] is the sum of those. A batch whose
metric_sums_M[0] is zero has nothing to learn from: its loss is zero, and nothing is updated.

Contract of batches: an endless iterator of batches with state_dict(), load_state_dict(state) and take_metrics(). A
batch has arrays() with a leading axis A, num_micro_batches (the first ones of A, the rest is room) and num_tokens (of
its rows): this rank's share of a step, of the same shapes and with as many micro-batches on every rank.

A micro-batches of a step, M metrics.
"""

import json
import math
import time

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, ops

from ..ops.adamw import global_norm
from . import checkpoint as checkpoints
from .distributed import Exchange, Ranks
from .metrics import MetricsFile, Reporter, peak_memory_gib, say, step_line
from .optim import AdamW, WeightSharing, learning_rate


def make_gradient_step(loss_fn, parameters, num_metrics, exchange=None, accumulate=True):
    """step(num_micro_batches, *arrays with a leading axis A) -> (loss_sum, metric_sums_M, gradients of loss_sum).

    num_micro_batches: int32 scalar tensor, the first of A that are computed; at least 1. exchange: sums the gradients
    of every micro-batch over the ranks, so that only this rank's chunks of them are kept. accumulate=False takes A = 1
    alone, and needs no memory for sums; with it the gradients are those sums, which the next call overwrites.
    """
    value_and_grad = ops.value_and_grad(loss_fn, None, parameters, has_aux=True)
    # Parameters, to be added to in place: of tensors MindSpore keeps the zeros, and a copy for every addition.
    sums = ParameterTuple([Parameter(Tensor(np.zeros(p.shape if exchange is None else exchange.chunks[j], np.float32)),
                                     name=f"sum.{p.name}", requires_grad=False)
                           for j, p in enumerate(parameters)]) if accumulate else None

    def micro_batch(i, batch):
        part = ()
        for array in batch:
            part = part + (array[i],)
        (loss, metrics), grads = value_and_grad(*part)
        return loss, metrics, grads if exchange is None else exchange(grads)

    def gradient_step(num_micro_batches, *batch):
        if not accumulate:
            return micro_batch(0, batch)
        loss = ops.zeros((), ms.float32)
        metrics = ops.zeros((num_metrics,), ms.float32)
        zero = ops.cast(num_micro_batches * 0, ms.float32)  # a constant's zeros would be kept beside the sums
        for j in range(len(sums)):
            ops.assign(sums[j], ops.fill(ms.float32, sums[j].shape, zero))
        i = ops.zeros((), ms.int32)
        while i < num_micro_batches:
            part_loss, part_metrics, part_grads = micro_batch(i, batch)
            loss = loss + part_loss
            metrics = metrics + part_metrics
            for j in range(len(sums)):
                ops.assign_add(sums[j], part_grads[j])
            i = i + 1
        grads = ()
        for j in range(len(sums)):
            grads = grads + (sums[j],)
        return loss, metrics, grads

    return gradient_step


class Loop:
    """Trains parameters in place, with checkpoints and metrics in a run folder.

    metric_names: of metric_sums_M[1:]. save_model(path) writes the model's files into a checkpoint folder. ranks: the
    distributed.Ranks that share the work; alone by default.
    flops_per_token and peak_flops (per second, of all devices) give MFU; None where the peak is not known.
    """

    def __init__(self, loss_fn, metric_names, parameters, *, train, run, num_steps, folder, save_model,
                 ranks=None, flops_per_token=None, peak_flops=None):
        self.metric_names, self.train, self.run = tuple(metric_names), train, run
        self.num_steps, self.folder, self.save_model = num_steps, folder, save_model
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self.parameters = ParameterTuple(parameters)
        self.ranks = ranks = ranks or Ranks()
        exchange = Exchange(self.parameters, ranks.group, run.shard) if ranks.size > 1 else None
        self.optimizer = AdamW(self.parameters, train, exchange)
        # This rank's of the optimizer's state: the i-th of n chunks.
        self.part = (ranks.rank, ranks.size) if self.optimizer.exchange is not None else (0, 1)
        self.metrics_file = MetricsFile(folder, ranks.is_main)
        self.step = 0
        self.num_updates = 0  # steps that had something to learn from
        self.best = None  # {"step", "value"} of the best validation
        self.num_tokens = 0
        self.started, self.seconds_before = time.monotonic(), 0.0  # of this start, and of those before it

        self.loss_fn, self.exchange = loss_fn, exchange
        self._steps = {}
        self.share_weights = None
        if self.optimizer.exchange is not None:
            sharing = WeightSharing(self.optimizer)
            self.share_weights = ms.jit(sharing.construct) if run.mode == "graph" else sharing

    def training_step(self, hyperparameters_5, num_micro_batches, *batch):
        """One step on tensors. Returns loss_sum, gradient norm, metric_sums_M, and this rank's loss_sum."""
        accumulate = batch[0].shape[0] > 1
        if accumulate not in self._steps:
            step = self._make_step(accumulate)
            self._steps[accumulate] = ms.jit(step) if self.run.mode == "graph" else step
        return self._steps[accumulate](hyperparameters_5, num_micro_batches, *batch)

    def _make_step(self, accumulate):
        exchange, optimizer, clip_norm = self.exchange, self.optimizer, self.train.clip_norm
        each_micro_batch = exchange is not None and self.run.shard == "gradients"
        gradient_step = make_gradient_step(self.loss_fn, self.parameters, 1 + len(self.metric_names),
                                           exchange if each_micro_batch else None, accumulate)

        def training_step(hyperparameters_5, num_micro_batches, *batch):
            loss, metrics, grads = gradient_step(num_micro_batches, *batch)
            own_loss = loss
            if exchange is not None:
                sums = exchange.all_reduce(ops.concat((loss.reshape(1), metrics)))
                loss, metrics = sums[0], sums[1:]
                if not each_micro_batch:
                    grads = exchange(grads)
                norm = exchange.norm(grads)
            else:
                norm = global_norm(grads)
            weight = metrics[0]
            norm = norm / weight  # NaN where the weight is zero
            finite = ops.logical_and(ops.isfinite(norm), ops.isfinite(loss))
            if finite:
                scale = clip_norm / (ops.maximum(norm, ops.full_like(norm, clip_norm)) * weight)
                loss = ops.depend(loss, optimizer(grads, scale, hyperparameters_5))
            return loss, norm, metrics, own_loss

        return training_step

    def seconds(self):
        """Wall time of the run so far, over all its starts."""
        return self.seconds_before + time.monotonic() - self.started

    def optimizer_parameters(self):
        return list(self.optimizer.m) + list(self.optimizer.v)

    def resume(self, load_model):
        """Continue from the newest checkpoint, if there is one: load_model(path) sets the weights. Returns its extra
        state (what `fit` was given as state), or None."""
        newest = checkpoints.newest_checkpoint(self.folder)
        if newest is None:
            self.metrics_file.keep_until(-1)
            return None
        state = checkpoints.read_state(newest)
        load_model(newest)
        self.optimizer.take_weights()
        self._load_optimizer(newest)
        self.step, self.best, self.num_tokens = state["step"], state["best"], state["num_tokens"]
        self.num_updates = state["num_updates"]
        self.seconds_before = state["seconds"]
        self.metrics_file.keep_until(self.step)
        say(f"resuming at step {self.step} of {self.num_steps} from {newest}")
        return state["state"]

    def continue_optimizer(self, checkpoint):
        """Start with the optimizer's state in a checkpoint of another run, the phase before this one."""
        self._load_optimizer(checkpoint)
        self.num_updates = checkpoints.read_state(checkpoint)["num_updates"]

    def _load_optimizer(self, checkpoint):
        sizes = {f"{kind}.{p.name}": p.size for kind in ("m", "v") for p in self.parameters}
        arrays = checkpoints.load_optimizer(checkpoint, sizes, *self.part)
        for parameter in self.optimizer_parameters():
            # Assigned in place: Parameter.set_data swaps the buffer, and a graph that is compiled keeps the former one.
            array = Tensor(arrays[parameter.name].reshape(parameter.shape))
            if parameter.dtype == ms.float32:
                ops.assign(parameter, array)
            else:  # the CPU backend assigns no bfloat16: before the first step set_data will do
                parameter.set_data(ops.cast(array, parameter.dtype))

    def save(self, state):
        """Write a checkpoint of this moment. state: JSON-able, given back by `resume`."""
        checkpoints.save_checkpoint(self.folder, self.step, self.save_model,
                                    checkpoints.as_arrays(self.optimizer_parameters()),
                                    {"best": self.best, "num_tokens": self.num_tokens, "num_updates": self.num_updates,
                                     "seconds": round(self.seconds(), 1), "state": state}, self.ranks.world, self.part)
        if self.ranks.is_main:
            # Not at its own step alone: a run that was killed in between would lose it to prune_checkpoints.
            if self.best and self.best["step"] in checkpoints.list_checkpoints(self.folder):
                checkpoints.mark_best(self.folder, self.best["step"])
            checkpoints.prune_checkpoints(self.folder, self.run.keep_checkpoints)

    def validate(self, evaluate):
        """Write evaluate() -> ({name: number}, better) at this step; `better` orders validations, larger is better."""
        values, better = evaluate()
        for name, value in values.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"step {self.step}, held-out {name} {value}: not finite; the last good "
                                         f"checkpoint is {self._last_good()}. Check the weights that the run starts "
                                         "from, or lower train.lr.")
        self.metrics_file.write(self.step, {f"heldout/{name}": value for name, value in values.items()})
        say(f"step {self.step}/{self.num_steps}  held-out  " +
            "  ".join(f"{name} {value:.4f}" for name, value in values.items()))
        if self.best is None or better > self.best["value"]:
            self.best = {"step": self.step, "value": better}

    def fit(self, batches, until_step, evaluate=None, state=None):
        """Train to `until_step` (exclusive) on batches, see the contract above.

        evaluate: see `validate`; called before step 0, every train.eval_every steps and after the last one.
        Raises FloatingPointError on a loss or gradient that is not finite, before the update.
        """
        extra = dict(state or {})

        def full_state():
            return {**extra, "batches": batches.state_dict()}

        if self.step == 0 and evaluate:
            self.validate(evaluate)
        window = _Window(len(self.metric_names))
        with Reporter("training", self.num_steps, self.step) as reporter:
            while self.step < until_step:
                started = time.monotonic()
                batch = next(batches)
                arrays = [Tensor(array) for array in batch.arrays()]
                ready = time.monotonic()
                lr = learning_rate(self.step, self.num_steps, self.train)
                with self.ranks.world.meeting(f"step {self.step + 1}", self.run.step_timeout_s):
                    loss, norm, metrics, own_loss = self.training_step(
                        self.optimizer.hyperparameters(self.num_updates, lr), Tensor(batch.num_micro_batches, ms.int32),
                        *arrays)
                    loss, norm = float(loss.asnumpy()), float(norm.asnumpy())
                    metrics = metrics.asnumpy().astype(np.float64)
                if metrics[0] == 0 and loss == 0:
                    norm = 0.0
                elif not (math.isfinite(loss) and math.isfinite(norm)):
                    where = self._source_of_trouble(math.isfinite(float(own_loss.asnumpy())))
                    raise FloatingPointError(
                        f"step {self.step}, {where}: loss {np.float64(loss) / metrics[0]}, grad_norm {norm}: not "
                        f"finite; nothing was updated. The last good checkpoint is {self._last_good()}. A lower "
                        "train.lr, a longer train.warmup_steps or cleaner data usually help.")
                elif self.share_weights:
                    self.share_weights()
                self.step += 1
                self.num_updates += int(metrics[0] > 0)
                num_tokens = batch.num_tokens * self.ranks.num_data
                self.num_tokens += num_tokens
                window.add(loss, norm, metrics, num_tokens, ready - started, time.monotonic() - started)
                if self.step % self.run.log_every == 0 or self.step == until_step:
                    values = window.take(self.metric_names) | batches.take_metrics() | {
                        "lr": lr, "memory_gib": round(peak_memory_gib(self.run.device), 3),
                        "num_tokens": self.num_tokens}
                    values |= self.ranks.measure(values)
                    if self.flops_per_token and self.peak_flops:
                        values["mfu"] = values["tokens_per_s"] * self.flops_per_token / self.peak_flops
                    self.metrics_file.write(self.step, values)
                    reporter.advance(self.step, step_line(self.step, self.num_steps, values, reporter.eta_s()))
                else:
                    reporter.advance(self.step)
                every = self.train.eval_every
                if evaluate and (self.step == self.num_steps or (every and self.step % every == 0)):
                    self.validate(evaluate)
                    best_now = self.best["step"] == self.step
                else:
                    best_now = False
                if best_now or self.step % self.run.save_every == 0 or self.step == until_step:
                    self.save(full_state())

    def _source_of_trouble(self, is_finite):
        """Which rank or ranks had a loss that is not finite; all, if only a gradient was not."""
        everyone = self.ranks.world.gather("find the trouble", is_finite)
        bad = [rank for rank, own_is_finite in enumerate(everyone) if not own_is_finite]
        return f"rank {', '.join(map(str, bad or range(self.ranks.size)))}"

    def _last_good(self):
        return checkpoints.newest_checkpoint(self.folder) or "none"

    def finish(self, summary):
        """Mark the run as complete: done.json with the summary."""
        if self.ranks.is_main:
            checkpoints.write_atomic(self.folder / "done.json", json.dumps({"step": self.step, **summary}, indent=1))


class _Window:
    """Sums since the last step line."""

    def __init__(self, num_metrics):
        self.num_metrics = num_metrics
        self.clear()

    def clear(self):
        self.loss = self.norm = self.tokens = self.waited = self.seconds = 0.0
        self.steps = 0
        self.metrics = np.zeros(1 + self.num_metrics)

    def add(self, loss, norm, metrics, tokens, waited, seconds):
        self.loss += loss
        self.norm = norm
        self.metrics += metrics
        self.tokens += tokens
        self.waited += waited
        self.seconds += seconds

    def take(self, names):
        weight = self.metrics[0] or 1.0  # zero: nothing to learn from, and all sums are zero
        values = {"loss": self.loss / weight, "grad_norm": self.norm,
                  "tokens_per_s": round(self.tokens / self.seconds, 1),
                  "data_wait": round(self.waited / self.seconds, 4)}
        values |= {name: self.metrics[i + 1] / weight for i, name in enumerate(names)}
        self.clear()
        return values
