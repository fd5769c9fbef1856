"""AdamW against torch, the schedule against hand-worked numbers."""

import math

import numpy as np
import pytest

from mindpangu.config import TrainConfig, load_recipe


def _train(**changes):
    values = dict(steps=10, rows_per_step=1, micro_batch_rows=1, lr=0.1, min_lr=0.01, warmup_steps=2, beta1=0.9,
                  beta2=0.95, eps=1e-6, weight_decay=0.1, clip_norm=1.0)
    return TrainConfig(**values | changes)


def test_schedule_warms_up_linearly_and_ends_at_min_lr(mindspore_cpu):
    from mindpangu.runtime.optim import learning_rate

    train = _train()
    rates = [learning_rate(step, 10, train) for step in range(11)]
    assert rates[:3] == pytest.approx([0.05, 0.1, 0.1])  # two warm-up steps, then the cosine's top
    assert rates[6] == pytest.approx(0.055)  # half-way between 0.1 and 0.01
    assert rates[10] == pytest.approx(0.01)
    assert rates[4] == pytest.approx(0.01 + 0.045 * (1 + math.cos(math.pi / 4)))


def test_schedule_stays_at_min_lr_after_decay_steps(mindspore_cpu):
    """GRPO's: 1e-6 to 5e-7 within the first 100 steps, constant after (openPangu Embedded-1B, section 4.1.2)."""
    from mindpangu.runtime.optim import learning_rate

    train = _train(lr=1e-6, min_lr=5e-7, warmup_steps=0, decay_steps=100)
    rates = [learning_rate(step, 164, train) for step in (0, 50, 100, 101, 163)]
    assert rates == pytest.approx([1e-6, 7.5e-7, 5e-7, 5e-7, 5e-7])


@pytest.mark.parametrize("scale", ["smoke", "tiny", "1b"])
def test_three_phases_of_pretraining_follow_one_cosine_and_annealing_its_own(mindspore_cpu, scale):
    """Against float64 over the steps of all three; P1 2.2: 5e-3 -> 1e-5."""
    from mindpangu.runtime.optim import learning_rate

    phases = [load_recipe([f"recipe=pretrain_{name}", f"scale={scale}"]).train
              for name in ("general_4k", "general_8k", "reasoning_8k", "annealing_32k")]
    total, warmup = sum(train.steps for train in phases[:3]), phases[0].warmup_steps
    if scale == "1b":
        assert (phases[0].lr, phases[0].min_lr, total) == (5e-3, 1e-5, 566_245)
    steps = np.arange(total)
    cosine = phases[0].min_lr + (phases[0].lr - phases[0].min_lr) * np.cos((steps - warmup) / (total - warmup)
                                                                           * np.pi / 2) ** 2
    expected = np.where(steps < warmup, phases[0].lr * (steps + 1) / warmup, cosine)
    done = 0
    for train in phases[:3]:
        every = max(1, train.steps // 997)
        found = [learning_rate(step, train.steps, train) for step in range(0, train.steps, every)]
        np.testing.assert_allclose(found, expected[done:done + train.steps:every], rtol=1e-9)
        done += train.steps
    annealing = phases[3]
    assert learning_rate(0, annealing.steps, annealing) == annealing.lr == phases[0].min_lr
    assert learning_rate(annealing.steps, annealing.steps, annealing) == annealing.min_lr


def test_moments_in_bfloat16_follow_float64_ones_that_are_rounded_as_often(cpu_library, mindspore_cpu):
    import mindspore as ms

    from mindpangu.ops import kernels
    from mindpangu.ops.adamw import updated
    from mindpangu.runtime.optim import AdamW

    kernels.select("native", [], "CPU", cpu_library.path)

    def rounded(x):
        bits = x.astype(np.float32).view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32).astype(np.float64)

    train = _train(moments_dtype="bfloat16")
    random = np.random.default_rng(1)
    start = [random.standard_normal(shape).astype(np.float32) for shape in ((7, 5), (130, 257), (5,))]
    ours = [ms.Parameter(ms.Tensor(value), name=f"p{i}") for i, value in enumerate(start)]
    weights = [value.astype(np.float64) for value in start]
    m, v = ([np.zeros(value.shape) for value in start] for _ in range(2))
    adamw = AdamW(ours, train)
    assert {moment.dtype for moment in (*adamw.m, *adamw.v)} == {ms.bfloat16}

    def update(hyperparameters, *grads):
        return adamw(grads, ms.ops.full((), 0.5, dtype=ms.float32), hyperparameters)

    step_fn = ms.jit(update)
    for step in range(12):
        grads = [random.standard_normal(p.shape).astype(np.float32) for p in ours]
        hyperparameters = adamw.hyperparameters(step, 0.01)
        step_fn(hyperparameters, *map(ms.Tensor, grads))
        lr, beta1, beta2, eps, decay = hyperparameters.asnumpy().astype(np.float64)
        for i, grad in enumerate(grads):
            # What the composed update of other devices computes, from the same moments.
            composed = updated(*(ms.Tensor(x.astype(np.float32)) for x in (weights[i], m[i], v[i], 0.5 * grad)),
                               hyperparameters, float(grad.ndim > 1))
            grad = 0.5 * grad.astype(np.float64)
            first, second = beta1 * m[i] + (1 - beta1) * grad, beta2 * v[i] + (1 - beta2) * grad ** 2
            weights[i] -= lr * (first / (np.sqrt(second) + eps) + decay * (weights[i].ndim > 1) * weights[i])
            for ours_now, theirs in zip(composed, (weights[i], first, second), strict=True):
                np.testing.assert_allclose(ours_now.asnumpy(), theirs, rtol=2e-5, atol=1e-6)
            m[i], v[i] = rounded(first), rounded(second)
    for parameter, wanted in zip(ours, weights, strict=True):
        # A moment between two bfloat16 may be rounded the other way in float32: one part in 256 of a step of 0.01.
        difference = np.abs(parameter.asnumpy() - wanted)
        assert difference.max() < 1e-3 and np.median(difference) < 1e-6
    kernels.select("reference", [], "CPU", cpu_library.path)


def test_adamw_with_clipping_matches_torch_over_many_steps(kernel):
    import mindspore as ms
    import torch

    from mindpangu.ops.adamw import global_norm
    from mindpangu.runtime.optim import AdamW

    train = _train()
    random = np.random.default_rng(0)
    start = {"matrix": random.standard_normal((7, 5)).astype(np.float32),
             "large": random.standard_normal((300, 257)).astype(np.float32),
             "bias": random.standard_normal(5).astype(np.float32)}
    ours = [ms.Parameter(ms.Tensor(value), name=name) for name, value in start.items()]
    theirs = [torch.nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in start.values()]
    adamw = AdamW(ours, train)
    groups = [{"params": theirs[:2], "weight_decay": 0.1}, {"params": theirs[2:], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.95), eps=1e-6)

    def update(hyperparameters, *grads):
        norm = global_norm(grads)
        return adamw(grads, 1.0 / ms.ops.maximum(norm, ms.ops.full_like(norm, 1.0)), hyperparameters)

    step_fn = ms.jit(update)
    for step in range(30):
        grads = [random.standard_normal(p.shape).astype(np.float32) * 10.0 ** random.integers(-3, 2) for p in ours]
        lr = 0.1 / (1 + step)
        step_fn(adamw.hyperparameters(step, lr), *map(ms.Tensor, grads))
        for group in reference.param_groups:
            group["lr"] = lr
        for parameter, grad in zip(theirs, grads, strict=True):
            parameter.grad = torch.tensor(grad, dtype=torch.float64)
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        reference.step()
    for parameter, wanted in zip(ours, theirs, strict=True):
        # 30 float32 updates of size lr against float64.
        np.testing.assert_allclose(parameter.asnumpy(), wanted.detach().numpy(), rtol=2e-5, atol=2e-6)
