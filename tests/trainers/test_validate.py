"""Held-out loss: every target counts once, however the rows fall into batches; against per-sample means in float64."""

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor, ops

from mindpangu.config import DistillConfig, ModelConfig
from mindpangu.data.batches import tokenized_to_samples
from mindpangu.model.weights import load_model
from mindpangu.runtime.distributed import Ranks
from mindpangu.trainers import distill, language_model
from mindpangu.trainers.validate import HeldoutLoss

CONFIG = ModelConfig(hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, intermediate_size=24,
                     vocab_size=40, max_seq_len=32, rope_theta=100.0, eos_id=2)
SEQ_LEN = 16
RTOL = 2e-5  # float32 against float64; MindSpore's exp on CPU has a relative error of up to 5e-6


@pytest.fixture(scope="module")
def llama(random_llama):
    return random_llama(CONFIG, 0)


@pytest.fixture(scope="module")
def model(llama, tmp_path_factory):
    ms.set_device("CPU")  # before the first tensor
    folder = tmp_path_factory.mktemp("model")
    llama.float().save_pretrained(folder)
    return load_model(folder)


def random_samples(lengths, seed=0):
    random = np.random.default_rng(seed)
    return tokenized_to_samples([(random.integers(3, 40, length), np.arange(length) >= random.integers(1, length))
                                 for length in lengths])


def logits_of(llama, samples):
    """[num_targets, V] float64, every sample by itself."""
    rows, double = [], llama.double()
    for start, end in zip(samples.offsets[:-1], samples.offsets[1:], strict=True):
        with torch.no_grad():
            logits = double(torch.tensor(samples.tokens[None, start:end], dtype=torch.long)).logits[0].numpy()
        rows.append(logits[np.flatnonzero(samples.is_target[start:end]) - 1])
    return np.concatenate(rows)


def cross_entropy(logits_NV, labels_N):
    return np.log(np.exp(logits_NV).sum(-1)) - logits_NV[np.arange(len(labels_N)), labels_N]


def heldout_loss(loss_fn, names, samples, num_rows, mode="eager"):
    return HeldoutLoss(loss_fn, names, samples, seq_len=SEQ_LEN, num_rows=num_rows, pad_id=0,
                       ranks=Ranks(), mode=mode)


# Samples of 9 and more tokens have a row of 16 to themselves: as many rows as samples.
@pytest.mark.parametrize(("lengths", "num_rows", "num_batches"), [
    ([12, 9, 16, 10, 11, 13, 9], 3, 3),  # 7 rows: the last batch is filled up with two
    ([12, 9, 16, 10, 11, 13, 9], 4, 2),
    ([12, 9, 16, 10], 2, 2),  # nothing to fill up
    ([12], 4, 1),  # the same row four times
    ([12, 9, 16], 8, 1),  # rows of three epochs in one batch
    ([3, 5, 2, 7, 16, 4, 9, 6, 2, 2, 8], 3, 2),  # several samples in a row
])
def test_every_sample_counts_once(model, llama, mindspore_cpu, lengths, num_rows, num_batches):
    samples = random_samples(lengths)
    loss_fn = language_model.make_loss(model, SEQ_LEN, 64)
    validation = heldout_loss(loss_fn, language_model.METRICS, samples, num_rows)
    assert len(validation.batches) == num_batches
    expected = cross_entropy(logits_of(llama, samples), samples.tokens[samples.is_target])
    measured = validation.measure()
    assert list(measured) == ["loss"]
    np.testing.assert_allclose(measured["loss"], expected.mean(), rtol=RTOL)


def test_metrics_are_means_over_the_targets_and_follow_the_weights(model, llama, mindspore_cpu):
    samples = random_samples([12, 9, 16, 10, 11], seed=1)
    logits = logits_of(llama, samples)
    teacher = logits + np.random.default_rng(2).normal(0, 1, logits.shape)
    logprobs = teacher - np.log(np.exp(teacher).sum(-1, keepdims=True))
    ids = np.argsort(-logprobs, -1)[:, :4]
    top = np.take_along_axis(logprobs, ids, -1)
    samples = samples._replace(extras={"teacher_ids": ids.astype(np.int32), "teacher_logprobs": top.astype(np.float32)})
    loss_fn = distill.make_loss(model, DistillConfig(weight=0.8), SEQ_LEN, 64)
    validation = heldout_loss(loss_fn, distill.METRICS, samples, 2, "graph")

    def expected(logits):
        q = np.exp(np.take_along_axis(logits - np.log(np.exp(logits).sum(-1, keepdims=True)), ids, -1))
        p, q = (np.concatenate([x, 1 - x.sum(-1, keepdims=True)], -1) for x in (np.exp(top), q))
        kl = (p * np.log(p / q)).sum(-1).mean()
        ce = cross_entropy(logits, samples.tokens[samples.is_target]).mean()
        return {"loss": 0.2 * ce + 0.8 * kl, "ce": ce, "kl": kl, "teacher_mass": p[:, :-1].sum(-1).mean(),
                "agreement": (logits.argmax(-1) == ids[:, 0]).mean()}

    assert validation.measure() == pytest.approx(expected(logits), rel=RTOL)
    weight = model.embedding.asnumpy().copy()
    changed = weight + np.random.default_rng(3).normal(0, 0.1, weight.shape).astype(np.float32)
    try:
        ops.assign(model.embedding, Tensor(changed))
        with torch.no_grad():
            llama.model.embed_tokens.weight.copy_(torch.tensor(changed))
        assert validation.measure() == pytest.approx(expected(logits_of(llama, samples)), rel=RTOL)
    finally:
        ops.assign(model.embedding, Tensor(weight))
        with torch.no_grad():
            llama.model.embed_tokens.weight.copy_(torch.tensor(weight))
