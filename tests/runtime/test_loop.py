"""THE step and the loop: gradients, resume, failures. A small real model on real packed batches."""

import contextlib
import json

import numpy as np
import pytest

from mindpangu.config import ModelConfig, RunConfig, TrainConfig
from mindpangu.data.batches import PackedBatches, tokenized_to_samples

CONFIG = ModelConfig(hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, intermediate_size=24,
                     vocab_size=40, max_seq_len=64, rope_theta=1e4, eos_id=2)
SEQ_LEN = 32


def _samples(seed=0, count=60):
    random = np.random.default_rng(seed)
    samples = []
    for _ in range(count):
        length = int(random.integers(4, 20))
        tokens = random.integers(3, CONFIG.vocab_size, length).astype(np.int32)
        samples.append((tokens, np.arange(length) >= random.integers(1, length)))
    return tokenized_to_samples(samples)


def _batches(rows_per_step=8, micro_batch_rows=4):
    return PackedBatches(_samples(), seq_len=SEQ_LEN, rows_per_step=rows_per_step, micro_batch_rows=micro_batch_rows,
                         pad_id=0, seed=1)


def _model():
    from mindpangu.model.pangu import Pangu

    return Pangu(CONFIG, seed=3)


def _loss(model):
    from mindpangu.trainers.language_model import make_loss

    return make_loss(model, SEQ_LEN, 64)


def _loop(folder, model, mode="graph", num_steps=9, moments_dtype="float32", schedule=None, ranks=None, **run):
    from mindpangu.model.weights import save_weights
    from mindpangu.runtime.loop import Loop

    train = TrainConfig(steps=num_steps, rows_per_step=8, micro_batch_rows=4, lr=1e-2, warmup_steps=2,
                        moments_dtype=moments_dtype, **schedule or {})
    return Loop(_loss(model), (), model.trainable_params(), train=train,
                run=RunConfig(mode=mode, **({"log_every": 1, "save_every": 2} | run)), num_steps=num_steps,
                folder=folder, save_model=lambda path: save_weights(model, path), ranks=ranks)


def _rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _losses(folder):
    return [(row["step"], row["loss"], row["grad_norm"]) for row in _rows(folder) if "loss" in row]


def _resumed(folder, **options):
    """A fresh model, loop and batches that continue from the folder's newest checkpoint."""
    from mindpangu.model.weights import load_weights

    model = _model()
    loop = _loop(folder, model, **options)
    batches = _batches()
    state = loop.resume(lambda checkpoint: load_weights(model, checkpoint))
    if state:
        batches.load_state_dict(state["batches"])
    return model, loop, batches


def test_gradients_do_not_depend_on_how_the_batch_is_split(mindspore_cpu):
    import mindspore as ms

    from mindpangu.runtime.loop import make_gradient_step

    model = _model()
    parameters = ms.ParameterTuple(model.trainable_params())
    step = ms.jit(make_gradient_step(_loss(model), parameters, 1))
    results = []
    for micro_batch_rows in (8, 2, 1):
        batch = next(_batches(8, micro_batch_rows))
        assert batch.tokens_AT.shape[0] == 8 // micro_batch_rows
        loss, metrics, grads = step(ms.Tensor(batch.num_micro_batches), *map(ms.Tensor, batch.arrays()))
        weight = float(metrics.asnumpy()[0])
        results.append((float(loss.asnumpy()) / weight, [grad.asnumpy() / weight for grad in grads]))
    for loss, grads in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-6)
        for grad, reference in zip(grads, results[0][1], strict=True):
            # The promise is 1e-6 of each tensor's scale: float32 sums in another order.
            assert np.abs(grad - reference).max() <= 1e-6 * max(1.0, np.abs(reference).max())


def test_recomputed_layers_give_the_same_gradients(mindspore_cpu):
    import mindspore as ms

    from mindpangu.runtime.loop import make_gradient_step

    batch = next(_batches())
    results = []
    for recompute in (False, True):
        model = _model()
        for layer in model.layers if recompute else ():
            layer.recompute()
        step = ms.jit(make_gradient_step(_loss(model), ms.ParameterTuple(model.trainable_params()), 1))
        results.append(step(ms.Tensor(batch.num_micro_batches), *map(ms.Tensor, batch.arrays())))
    (loss, _, grads), (loss_again, _, grads_again) = results
    assert float(loss.asnumpy()) == float(loss_again.asnumpy())
    for grad, again in zip(grads, grads_again, strict=True):
        np.testing.assert_array_equal(again.asnumpy(), grad.asnumpy())


def test_eager_and_graph_mode_give_the_same_losses(mindspore_cpu, tmp_path):
    losses = {}
    for mode in ("graph", "eager"):
        _loop(tmp_path / mode, _model(), mode, num_steps=4, save_every=100).fit(_batches(), 4)
        losses[mode] = np.array(_losses(tmp_path / mode))
    np.testing.assert_allclose(losses["eager"], losses["graph"], rtol=1e-6)


def test_a_resumed_run_repeats_the_losses_with_moments_in_bfloat16(cpu_library, mindspore_cpu, tmp_path):
    from mindpangu.ops import kernels

    kernels.select("native", [], "CPU", cpu_library.path)
    whole = _loop(tmp_path / "whole", _model(), moments_dtype="bfloat16")
    whole.fit(_batches(), 9)
    _loop(tmp_path / "parts", _model(), moments_dtype="bfloat16").fit(_batches(), 4)
    _, loop, batches = _resumed(tmp_path / "parts", moments_dtype="bfloat16")
    loop.fit(batches, 9)
    assert _losses(tmp_path / "parts") == _losses(tmp_path / "whole")
    sizes = [sum(path.stat().st_size for path in (tmp_path / name).glob("checkpoints/step-000009/optimizer-*"))
             for name in ("whole", "parts")]
    assert sizes[0] == sizes[1] < 8 * sum(p.size for p in whole.parameters), "float32 moments take 8 bytes"
    kernels.select("reference", [], "CPU", cpu_library.path)


def test_resumed_run_repeats_the_uninterrupted_losses_exactly(mindspore_cpu, tmp_path):
    whole = _model()
    _loop(tmp_path / "whole", whole).fit(_batches(), 9)
    _loop(tmp_path / "parts", _model()).fit(_batches(), 3)
    for stop, then in ((3, 5), (5, 9)):  # in the middle of an epoch and at its end
        second, loop, batches = _resumed(tmp_path / "parts")
        assert loop.step == stop
        loop.fit(batches, then)
    assert _losses(tmp_path / "parts") == _losses(tmp_path / "whole")
    for left, right in zip(second.trainable_params(), whole.trainable_params(), strict=True):
        np.testing.assert_array_equal(left.asnumpy(), right.asnumpy())


def test_two_phases_with_one_schedule_and_optimizer_are_the_run_in_one(mindspore_cpu, tmp_path):
    from mindpangu.model.weights import load_weights

    whole = _loop(tmp_path / "whole", _model(), num_steps=6, schedule={"decay_steps": 6})
    whole.fit(_batches(), 6)
    first = _loop(tmp_path / "first", _model(), num_steps=3, schedule={"decay_steps": 6})
    batches = _batches()
    first.fit(batches, 3)
    checkpoint = tmp_path / "first/checkpoints/step-000003"
    model = _model()
    load_weights(model, checkpoint)
    second = _loop(tmp_path / "second", model, num_steps=3, schedule={"first_step": 3, "decay_steps": 6})
    second.continue_optimizer(checkpoint)
    second.fit(batches, 3)
    losses = _losses(tmp_path / "first") + [(step + 3, *rest) for step, *rest in _losses(tmp_path / "second")]
    assert losses == _losses(tmp_path / "whole")
    for ours, expected in zip(second.parameters, whole.parameters, strict=True):
        np.testing.assert_array_equal(ours.asnumpy(), expected.asnumpy())
    assert [row["lr"] for row in _rows(tmp_path / "second")] == [row["lr"] for row in _rows(tmp_path / "whole")][3:]


def test_ranks_meet_in_every_step_within_its_limit(mindspore_cpu, tmp_path):
    from mindpangu.runtime.cluster import World
    from mindpangu.runtime.distributed import Ranks

    events = []

    class Recording(World):
        @contextlib.contextmanager
        def meeting(self, what, limit_s):
            events.append((what, limit_s))
            yield
            events.append("over")

    loop = _loop(tmp_path, _model(), "eager", num_steps=2, ranks=Ranks(Recording()), step_timeout_s=5)
    step = loop.training_step

    def recorded_step(*arguments):
        events.append("computed")
        return step(*arguments)

    loop.training_step = recorded_step
    loop.fit(_batches(), 2)
    assert events == [("step 1", 5), "computed", "over", ("step 2", 5), "computed", "over"]


def test_the_memory_in_a_step_line_is_that_of_the_device(mindspore_cpu, tmp_path, monkeypatch):
    monkeypatch.setattr(mindspore_cpu.runtime, "max_memory_allocated", lambda: 3 << 30)  # stands for an NPU's
    _loop(tmp_path, _model(), "eager", num_steps=1, device="Ascend").fit(_batches(), 1)
    assert [row["memory_gib"] for row in _rows(tmp_path)] == [3.0]


def test_metrics_written_after_the_last_checkpoint_are_not_kept_twice(mindspore_cpu, tmp_path):
    _loop(tmp_path, _model()).fit(_batches(), 4)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "loss": 1.0, "grad_norm": 1.0}\n{"step": 6, "lo')  # what a kill leaves behind
    _, loop, batches = _resumed(tmp_path)
    loop.fit(batches, 9)
    assert [step for step, _, _ in _losses(tmp_path)] == list(range(1, 10))


def test_a_loss_that_is_not_finite_stops_before_the_update(mindspore_cpu, tmp_path):
    import mindspore as ms

    model = _model()
    loop = _loop(tmp_path, model)
    loop.fit(_batches(), 2)
    weights = model.norm.asnumpy().copy()
    weights[0] = np.nan
    ms.ops.assign(model.norm, ms.Tensor(weights))
    before = {p.name: p.asnumpy().copy() for p in [*loop.parameters, *loop.optimizer_parameters()]}
    with pytest.raises(FloatingPointError, match=r"step 2, rank 0: loss nan.*step-000002"):
        loop.fit(_batches(), 9)
    for parameter in [*loop.parameters, *loop.optimizer_parameters()]:
        np.testing.assert_array_equal(parameter.asnumpy(), before[parameter.name])


class _Weighted:
    """Real batches, of which some have no weight, or are left out: all answers of a policy's batch can be masked."""

    def __init__(self, masked, skip=False):
        self.batches, self.masked, self.skip = _batches(), masked, skip

    def state_dict(self):
        return self.batches.state_dict()

    def take_metrics(self):
        return {"reward": 0.5}

    def __next__(self):
        batch = next(self.batches)
        if self.batches.state_dict()["step"] not in self.masked:
            return batch
        return next(self) if self.skip else batch._replace(loss_weights_AS=np.zeros_like(batch.loss_weights_AS))


@pytest.mark.parametrize("mode", ["graph", "eager"])
def test_a_batch_of_no_weight_has_zero_loss_and_leaves_weights_and_moments_as_they_are(mindspore_cpu, tmp_path, mode):
    model = _model()
    loop = _loop(tmp_path, model, mode)
    batches = _Weighted({2, 4})
    loop.fit(batches, 1)
    before = {p.name: p.asnumpy().copy() for p in [*loop.parameters, *loop.optimizer_parameters()]}
    loop.fit(batches, 2)
    for parameter in [*loop.parameters, *loop.optimizer_parameters()]:
        np.testing.assert_array_equal(parameter.asnumpy(), before[parameter.name])
    loop.fit(batches, 5)
    rows = [row for row in _rows(tmp_path) if "loss" in row]
    assert [row["loss"] == row["grad_norm"] == 0 for row in rows] == [False, True, False, True, False]
    assert (loop.step, loop.num_updates) == (5, 3) and rows[0]["reward"] == 0.5


def test_steps_that_teach_nothing_do_not_count_in_adamws_bias_correction(mindspore_cpu, tmp_path):
    ends = []
    for skip, num_steps in ((False, 5), (True, 3)):
        model = _model()
        loop = _loop(tmp_path / str(skip), model, num_steps=num_steps)
        for name, value in (("warmup_steps", 0), ("min_lr", loop.train.lr)):  # one rate, whatever the step
            object.__setattr__(loop.train, name, value)
        loop.fit(_Weighted({2, 4}, skip), num_steps)
        ends.append([parameter.asnumpy() for parameter in model.trainable_params()])
    for left, right in zip(*ends, strict=True):
        np.testing.assert_array_equal(left, right)


def test_a_heldout_loss_that_is_not_finite_stops_the_run(mindspore_cpu, tmp_path):
    loop = _loop(tmp_path, _model())
    with pytest.raises(FloatingPointError, match="step 0, held-out loss nan: not finite.* checkpoint is none"):
        loop.fit(_batches(), 9, lambda: ({"accuracy": 1.0, "loss": float("nan")}, 1.0))
    assert loop.best is None and not (tmp_path / "metrics.jsonl").exists() or _rows(tmp_path) == []


def test_best_and_newest_checkpoints_are_kept(mindspore_cpu, tmp_path):
    loop = _loop(tmp_path, _model(), save_every=1, keep_checkpoints=2)
    object.__setattr__(loop.train, "eval_every", 1)  # a recipe is read-only to everyone else
    scores = iter([0.1, 0.2, 0.9, 0.3, 0.3, 0.3, 0.3])  # before step 0 and after each step
    loop.fit(_batches(), 6, lambda: ({"accuracy": 0.0}, next(scores)))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "best", "step-000002", "step-000005", "step-000006"]
    assert (tmp_path / "checkpoints" / "best").resolve().name == "step-000002"


def test_a_best_checkpoint_that_a_kill_left_unmarked_is_kept(mindspore_cpu, tmp_path):
    loop = _loop(tmp_path, _model(), save_every=1, keep_checkpoints=1)
    object.__setattr__(loop.train, "eval_every", 2)
    loop.fit(_batches(), 2, lambda: ({"accuracy": 0.0}, loop.step))
    (tmp_path / "checkpoints" / "best").unlink()  # killed after the checkpoint of step 2 and before its mark
    _, loop, batches = _resumed(tmp_path, save_every=1, keep_checkpoints=1)
    loop.fit(batches, 4)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["best", "step-000002", "step-000004"]
    assert (tmp_path / "checkpoints" / "best").resolve().name == "step-000002"


def test_a_checkpoint_of_another_model_is_refused(mindspore_cpu, tmp_path):
    from mindpangu.runtime.checkpoint import load_optimizer, newest_checkpoint

    _loop(tmp_path, _model()).fit(_batches(), 2)
    with pytest.raises(ValueError, match="belongs to another model"):
        load_optimizer(newest_checkpoint(tmp_path), {"m.embedding": 9})
