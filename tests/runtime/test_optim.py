"""AdamW against torch, the schedule against hand-worked numbers."""

import math

import numpy as np
import pytest

from mindpangu.config import TrainConfig


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
