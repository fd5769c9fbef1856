"""The distillation loss on packed batches against transformers and torch autograd in float64, a sample at a time."""

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor

from mindpangu.config import DistillConfig, ModelConfig
from mindpangu.data.batches import PackedBatches, Samples, tokenized_to_samples
from mindpangu.model.weights import hugging_face_names, load_model
from mindpangu.runtime.loop import make_gradient_step
from mindpangu.trainers.distill import METRICS, loss_weights, make_loss

CONFIG = ModelConfig(hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, intermediate_size=24,
                     vocab_size=40, max_seq_len=32, rope_theta=100.0, eos_id=2)
SEQ_LEN, TOP_K, CHUNK = 16, 5, 12
LENGTHS = [7, 3, 12, 5, 16, 9, 2, 4]  # 58 tokens: 4 rows of 16
# Float32 against float64, relative to the largest value: sums of up to 40 terms of 1e-6; MindSpore's exp on CPU has a
# relative error of up to 5e-6.
RTOL = 2e-5
KINDS = [
    {"loss_form": "convex", "weight": 0.9},
    {"loss_form": "convex", "weight": 0.3, "tail": "truncated"},
    {"loss_form": "additive", "weight": 0.5, "tail": "renormalised_both", "temperature": 2.0},
    {"loss_form": "additive", "weight": 0.9, "tail": "renormalised_teacher"},
    {"ce_on": "off", "weight": 0.7, "temperature": 2.0},
    {"ce_on": "off", "weight": 2.0, "loss_form": "additive"},
]


@pytest.fixture(scope="module")
def llama(random_llama):
    """The student, in float64."""
    llama = random_llama(CONFIG, 0)
    with torch.no_grad():
        llama.model.embed_tokens.weight *= 2
    return llama.double()


@pytest.fixture(scope="module")
def model(llama, tmp_path_factory):
    ms.set_device("CPU")  # before the first tensor
    folder = tmp_path_factory.mktemp("student")
    llama.float().save_pretrained(folder)
    llama.double()
    return load_model(folder)


@pytest.fixture(scope="module")
def samples(llama):
    """Ragged prompts and answers, with the top k of a teacher near the student."""
    random = np.random.default_rng(0)
    tokenized = []
    for length in LENGTHS:
        num_prompt = int(random.integers(1, length))
        tokenized.append((random.integers(3, CONFIG.vocab_size, length), np.arange(length) >= num_prompt))
    samples = tokenized_to_samples(tokenized)
    logits = np.concatenate([student_logits(llama, samples, n).detach().numpy() for n in range(len(LENGTHS))])
    return with_teacher(samples, logits + random.normal(0, 1, logits.shape))


def student_logits(llama, samples, n):
    """[targets of sample n, V]: the sample by itself."""
    span = slice(samples.offsets[n], samples.offsets[n + 1])
    logits = llama(torch.tensor(samples.tokens[None, span], dtype=torch.long)).logits[0]
    return logits[np.flatnonzero(samples.is_target[span]) - 1]


def with_teacher(samples, logits):
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    ids = np.argsort(-logprobs, -1)[:, :TOP_K]
    return samples._replace(extras={"teacher_ids": ids.astype(np.int32),
                                    "teacher_logprobs": np.take_along_axis(logprobs, ids, -1).astype(np.float32)})


def split(samples):
    """The data sets of one sample each."""
    before = np.concatenate([[0], np.cumsum(samples.is_target)])[samples.offsets]
    for n, (start, end) in enumerate(zip(samples.offsets[:-1], samples.offsets[1:], strict=True)):
        yield Samples(samples.tokens[start:end], np.array([0, end - start]), samples.is_target[start:end],
                      {name: extra[before[n]:before[n + 1]] for name, extra in samples.extras.items()})


def micro_batch(samples, num_rows=None):
    """All rows as one micro-batch, NumPy arrays."""
    num_rows = num_rows or PackedBatches(samples, seq_len=SEQ_LEN, rows_per_step=1, micro_batch_rows=1, pad_id=0,
                                         seed=0).num_rows
    batches = PackedBatches(samples, seq_len=SEQ_LEN, rows_per_step=num_rows, micro_batch_rows=num_rows, pad_id=0,
                            seed=0)
    assert batches.num_rows == num_rows and batches.num_dropped == 0
    return [array[0] for array in next(batches).arrays()]


def evaluate(model, kd, arrays):
    """loss sum, metric sums and {parameter: gradient of the loss sum}, eager."""
    parameters = dict(model.parameters_and_names())
    loss_fn = make_loss(model, kd, SEQ_LEN, CHUNK)
    (loss, metrics), gradients = ms.value_and_grad(loss_fn, None, list(parameters.values()), has_aux=True)(
        *map(Tensor, arrays))
    return (float(loss.asnumpy()), metrics.asnumpy(),
            {name: gradient.asnumpy() for name, gradient in zip(parameters, gradients, strict=True)})


def expected(llama, kd, samples):
    """(ce, kl, teacher mass, agreement) per target and the loss sum, float64 tensors, by the definitions."""
    logits = torch.cat([student_logits(llama, samples, n) for n in range(len(samples.offsets) - 1)])
    labels = torch.tensor(samples.tokens[samples.is_target], dtype=torch.long)
    ids = torch.tensor(samples.extras["teacher_ids"], dtype=torch.long)
    student = torch.log_softmax(logits, -1)
    ce = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    p = torch.tensor(samples.extras["teacher_logprobs"], dtype=torch.float64)
    mass = p.exp().sum(-1)
    q = student.gather(1, ids)
    p = torch.cat([p, torch.log1p(-p.exp().sum(-1, keepdim=True))], 1)
    q = torch.cat([q, student.scatter(1, ids, -torch.inf).logsumexp(-1, keepdim=True)], 1)
    p, q = torch.log_softmax(p / kd.temperature, -1), torch.log_softmax(q / kd.temperature, -1)
    if kd.tail != "bucket":
        p, q = p[:, :-1], q[:, :-1]
    if kd.tail in ("renormalised_teacher", "renormalised_both"):
        p = torch.log_softmax(p, -1)
    if kd.tail == "renormalised_both":
        q = torch.log_softmax(q, -1)
    kl = kd.temperature**2 * (p.exp() * (p - q)).sum(-1)
    ce_factor = 0 if kd.ce_on == "off" else 1 - kd.weight if kd.loss_form == "convex" else 1
    loss = (ce_factor * ce + kd.weight * kl).sum()
    return (ce, kl, mass, (logits.argmax(-1) == ids[:, 0]).double()), loss


def relative_error(ours, theirs):
    return np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-30)


def check_gradients(llama, gradients, loss):
    llama.zero_grad()
    loss.backward()
    theirs = {name: weight.grad.numpy() for name, weight in llama.named_parameters()}
    names = hugging_face_names(CONFIG)
    for path, gradient in gradients.items():
        wanted = np.concatenate([theirs.pop(name) for name, _ in names[path]])
        assert relative_error(gradient, wanted) < RTOL, path
    assert not theirs


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
def test_loss_gradients_and_metrics_are_those_of_float64(model, llama, samples, kind, mindspore_cpu):
    kd = DistillConfig(**kind)
    loss, metrics, gradients = evaluate(model, kd, micro_batch(samples))
    per_target, expected_loss = expected(llama, kd, samples)
    assert relative_error(loss, expected_loss.item()) < RTOL
    sums = [samples.is_target.sum(), *(values.sum().item() for values in per_target)]
    np.testing.assert_allclose(metrics, sums, rtol=RTOL)
    assert METRICS == ("ce", "kl", "teacher_mass", "agreement") and 0 < sums[4] < sums[0]
    check_gradients(llama, gradients, expected_loss)


def test_the_compiled_step_sums_loss_metrics_and_gradients_over_micro_batches(model, llama, samples, mindspore_cpu):
    kd = DistillConfig()
    batch = next(PackedBatches(samples, seq_len=SEQ_LEN, rows_per_step=4, micro_batch_rows=2, pad_id=0, seed=0))
    parameters = dict(model.parameters_and_names())
    step = ms.jit(make_gradient_step(make_loss(model, kd, SEQ_LEN, CHUNK), ms.ParameterTuple(parameters.values()),
                                     1 + len(METRICS)))
    loss, metrics, gradients = step(Tensor(batch.num_micro_batches), *map(Tensor, batch.arrays()))
    per_target, expected_loss = expected(llama, kd, samples)
    num_targets = samples.is_target.sum()
    assert relative_error(loss.asnumpy(), expected_loss.item()) < RTOL
    np.testing.assert_allclose(metrics.asnumpy(), [num_targets, *(x.sum().item() for x in per_target)], rtol=RTOL)
    check_gradients(llama, {name: gradient.asnumpy() for name, gradient in zip(parameters, gradients, strict=True)},
                    expected_loss)


@pytest.mark.parametrize(("kind", "factors"), [
    ({"loss_form": "convex", "weight": 0.9}, (0.1, 0.9)), ({"loss_form": "convex", "weight": 1.0}, (0.0, 1.0)),
    ({"loss_form": "additive", "weight": 0.9}, (1.0, 0.9)), ({"loss_form": "additive", "weight": 3.0}, (1.0, 3.0)),
    ({"loss_form": "convex", "weight": 0.9, "ce_on": "off"}, (0.0, 0.9)),
    ({"loss_form": "additive", "weight": 0.9, "ce_on": "off"}, (0.0, 0.9)),
])
def test_the_forms_weigh_cross_entropy_and_kl_as_in_the_papers(kind, factors):
    assert loss_weights(DistillConfig(**kind)) == pytest.approx(factors)


def test_a_teacher_equal_to_the_student_has_no_kl_and_one_shifted_by_a_position_has(model, llama, samples,
                                                                                    mindspore_cpu):
    kd = DistillConfig(ce_on="off", weight=1.0)
    with torch.no_grad():
        own_logits = np.concatenate([student_logits(llama, samples, n).numpy() for n in range(len(LENGTHS))])
    aligned = with_teacher(samples, own_logits)
    num_targets = len(own_logits)
    _, metrics, gradients = evaluate(model, kd, micro_batch(aligned))
    weight, _, kl, _, agreement = metrics
    assert abs(kl) / weight < 1e-6 and agreement == weight == num_targets
    # At its minimum the loss has no slope: rounding of 1e-6 at each target.
    assert max(np.abs(gradient).max() for gradient in gradients.values()) < 1e-5 * num_targets
    for by in (1, -1):
        shifted = aligned._replace(extras={name: np.roll(extra, by, 0) for name, extra in aligned.extras.items()})
        _, metrics, _ = evaluate(model, kd, micro_batch(shifted))
        assert metrics[2] / weight > 0.5 and metrics[4] < 0.5 * weight
        # So does a batch whose hidden states are taken one position off.
        arrays = micro_batch(aligned)
        arrays[3] = np.where(arrays[5] > 0, np.clip(arrays[3] + by, 0, arrays[0].size - 1), arrays[3]).astype(np.int32)
        _, metrics, _ = evaluate(model, kd, arrays)
        assert metrics[2] / weight > 0.5


def test_ragged_prompts_in_one_batch_equal_the_sum_of_singles(model, samples, mindspore_cpu):
    kd = DistillConfig(loss_form="convex", weight=0.6)
    loss, metrics, gradients = evaluate(model, kd, micro_batch(samples))
    singles = [evaluate(model, kd, micro_batch(single)) for single in split(samples)]
    assert len(singles) == len(LENGTHS) and metrics[0] == samples.is_target.sum()
    assert relative_error(loss, sum(single[0] for single in singles)) < RTOL
    np.testing.assert_allclose(metrics, sum(single[1].astype(np.float64) for single in singles), rtol=RTOL)
    for name, gradient in gradients.items():
        assert relative_error(gradient, sum(single[2][name].astype(np.float64) for single in singles)) < RTOL, name


def test_padding_and_slots_without_weight_leave_no_trace(model, samples, mindspore_cpu):
    kd = DistillConfig()
    arrays = micro_batch(samples)
    tokens, positions, ends, index, labels, weights, ids, logprobs = (array.copy() for array in arrays)
    used = np.zeros(tokens.size, bool)  # tokens of samples
    for start, end in zip(ends[:-1], ends[1:], strict=True):
        used[start:end] = tokens[start:end].any()
    assert 0 < (~used).sum() == tokens.size - sum(LENGTHS) and 0 < (weights == 0).sum()
    random = np.random.default_rng(1)
    tokens[~used] = random.integers(3, 40, (~used).sum())
    empty = weights == 0
    labels[empty] = random.integers(3, 40, empty.sum())
    index[empty] = random.integers(0, tokens.size, empty.sum())
    ids[empty] = random.permutation(40)[:TOP_K]
    logprobs[empty] = -1 - np.arange(TOP_K)
    one = evaluate(model, kd, arrays)
    other = evaluate(model, kd, [tokens, positions, ends, index, labels, weights, ids, logprobs])
    assert one[0] == other[0]
    np.testing.assert_array_equal(one[1], other[1])
    for name, gradient in one[2].items():
        np.testing.assert_array_equal(gradient, other[2][name], err_msg=name)


def test_only_the_answers_tokens_are_targets_of_the_batch(samples):
    tokens, _, _, index, labels, weights, *_ = micro_batch(samples)
    assert sorted(labels[weights > 0]) == sorted(samples.tokens[samples.is_target])
    np.testing.assert_array_equal(tokens[index[weights > 0] + 1], labels[weights > 0])
