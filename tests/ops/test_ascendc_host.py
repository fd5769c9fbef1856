"""The AscendC operators as MindSpore's ops: their sources on the host against double precision and the CPU kernels."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from ascend_kernels.host.operators import Operators
from ascend_kernels.host.tiling import compile_op
from mindpangu.config import DistillConfig, ModelConfig, TrainConfig, load_recipe
from mindpangu.data.batches import PackedBatches, tokenized_to_samples
from mindpangu.model.pangu import Pangu
from mindpangu.ops import ascendc, kernels
from mindpangu.ops.adamw import global_norm
from mindpangu.ops.attention import attention, decode_attention, packed_attention
from mindpangu.ops.topk_kl import TAILS, topk_kl, topk_kl_of_part
from mindpangu.runtime.loop import make_gradient_step
from mindpangu.runtime.optim import AdamW
from mindpangu.trainers import distill, language_model

SOURCES = sorted(Path(sys.modules[Operators.__module__].__file__).parents[1].glob("*/op_host/*.cpp"))
MODES = pytest.mark.parametrize("mode", ["eager", "graph"])
HALVES = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
EPS = {"float16": 2.0**-11, "bfloat16": 2.0**-8}  # of a rounding


@pytest.fixture
def host(cpu_library, mindspore_cpu):
    """host(...) makes the operators' host build serve; it returns a Counter of their launches."""

    def select(operand_type=None, chip="ascend910b", kernels_="ascendc_host", device="CPU"):
        launches, operators = Counter(), Operators(chip)

        def run(op_type, arrays, attributes):
            launches[op_type] += 1
            return operators(op_type, arrays, attributes)

        rounded = operand_type and getattr(ms, operand_type)
        kernels.select(kernels_, [], device, cpu_library.path, kernels.AscendC(chip, run=run), rounded)
        return launches

    yield select
    kernels.select("reference", [], "CPU", cpu_library.path)


def rounded(array, dtype):
    return torch.tensor(array).to(getattr(torch, dtype)).double()


def tensor(array, dtype):
    return ops.cast(Tensor(array), getattr(ms, dtype))


def as_double(tensor_):
    return ops.cast(tensor_, ms.float32).asnumpy().astype(np.float64)


# ---- Top-k KL --------------------------------------------------------------------------------------------------------

def losses_case(num_positions=7, vocab_size=333, k=9):
    random = np.random.default_rng(0)
    logits = random.normal(0, 2, (num_positions, vocab_size)).astype(np.float32)
    ids = np.argsort(random.random(logits.shape), -1)[:, :k].astype(np.int32)
    teacher = 0.9 * random.dirichlet(np.ones(k), num_positions)
    labels = np.where(random.random(num_positions) < 0.5, ids[:, 0], random.integers(0, vocab_size, num_positions))
    weights = random.uniform(0, 2, (2, num_positions)).astype(np.float32)
    weights[:, 2] = 0
    return logits, labels.astype(np.int32), ids, np.log(teacher).astype(np.float32), *weights


def losses_reference(logits, labels, ids, logprobs, ce_weights, kl_weights, temperature, tail):
    """topk_kl by the definition; logits: torch double."""
    logits = logits.clone().requires_grad_()
    student, ids = torch.log_softmax(logits, -1), torch.tensor(ids).long()
    ce = -student.gather(1, torch.tensor(labels).long()[:, None])[:, 0]
    p, q = torch.tensor(logprobs).double(), student.gather(1, ids)
    mass = p.exp().sum(-1)
    p = torch.cat([p, torch.log1p(-mass)[:, None]], 1)
    q = torch.cat([q, student.scatter(1, ids, -torch.inf).logsumexp(-1, keepdim=True)], 1)
    p, q = torch.log_softmax(p / temperature, -1), torch.log_softmax(q / temperature, -1)
    if tail != "bucket":
        p, q = p[:, :-1], q[:, :-1]
    if tail.startswith("renormalised"):
        p = torch.log_softmax(p, -1)
    if tail == "renormalised_both":
        q = torch.log_softmax(q, -1)
    kl = (p.exp() * (p - q)).sum(-1) * temperature**2
    (ce * torch.tensor(ce_weights) + kl * torch.tensor(kl_weights)).sum().backward()
    agreement = (logits.argmax(-1) == ids[:, 0]).double()
    return [x.detach().numpy() for x in (ce, kl, mass, agreement, logits.grad)]


def check_losses(outputs, expected, eps):
    for ours, theirs in zip(outputs[:4], expected, strict=False):
        # Float32 sums of 333 terms, times a temperature of 2 squared.
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(outputs[4], expected[4], rtol=1.01 * eps, atol=1e-5)


@MODES
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(("tail", "temperature"), list(zip(TAILS, (1.0, 2.0, 1.0, 2.0), strict=True)))
def test_topk_kl_matches_double_precision(host, mode, dtype, tail, temperature):
    launches, case = host(), losses_case()

    def run(logits, *rest):
        return topk_kl(logits, *rest, temperature, tail)

    outputs = (ms.jit(run) if mode == "graph" else run)(tensor(case[0], dtype), *map(Tensor, case[1:]))
    assert outputs[4].dtype == getattr(ms, dtype)
    expected = losses_reference(rounded(case[0], dtype), *case[1:], temperature, tail)
    check_losses([as_double(output) for output in outputs], expected, EPS.get(dtype, 0))
    assert launches == {"PanguTopkKl": 1}


@HALVES
def test_float32_logits_are_rounded_to_the_runs_type_and_the_gradient_comes_back(host, dtype):
    launches, case = host(dtype), losses_case()
    outputs = topk_kl(*map(Tensor, case))
    assert outputs[4].dtype == ms.float32
    expected = losses_reference(rounded(case[0], dtype), *case[1:], 1.0, "bucket")
    check_losses([as_double(output) for output in outputs], expected, EPS[dtype])
    assert launches == {"PanguTopkKl": 1}


@MODES
def test_losses_alone_write_no_gradient(host, mode):
    host()
    case = [Tensor(array) for array in losses_case()]

    def run(*tensors):
        return topk_kl(*tensors, with_gradient=False), topk_kl(*tensors)

    alone, both = (ms.jit(run) if mode == "graph" else run)(*case)
    for ours, theirs in zip(alone[:4], both, strict=False):
        np.testing.assert_array_equal(ours.asnumpy(), theirs.asnumpy())
    assert alone[4].asnumpy().tolist() == [0] and both[4].shape == (7, 333)


def test_rows_of_padding_have_finite_losses_and_no_gradient(host):
    host()
    logits, labels, ids, logprobs, *weights = losses_case()
    ids[2], logprobs[2], labels[2] = 0, 0, 0  # as the data layer fills slots without a target; their weights are 0
    outputs = [as_double(output) for output in topk_kl(*map(Tensor, (logits, labels, ids, logprobs, *weights)))]
    assert all(np.isfinite(output).all() for output in outputs) and not outputs[4][2].any()


def statistics(case, begin, end):
    """What a rank with these columns brings to the collectives, in double precision: for the two maxima and the sum."""
    logits, labels, ids = case[0].astype(np.float64), case[1], case[2]
    is_top = np.zeros(logits.shape, bool)
    np.put_along_axis(is_top, ids, True, -1)
    here = np.arange(logits.shape[1]) >= begin
    here[end:] = False
    rest = np.where(is_top, -np.inf, logits)
    largest, own = rest.max(-1), np.where(here, rest, -np.inf)
    chosen = np.where(here, logits, -np.inf)
    maxima = [*np.take_along_axis(chosen, ids, -1).T, chosen[np.arange(len(labels)), labels], own.max(-1)]
    first = np.where(own.max(-1) == largest, own.argmax(-1), 2.0**31)
    return [Tensor(array.astype(np.float32)) for array in
            (np.stack(maxima, 1), -first, np.exp(own - largest[:, None]).sum(-1))]


@MODES
@pytest.mark.parametrize(("tail", "span"), list(zip(TAILS, ((0, 100), (100, 333), (0, 333), (332, 333)), strict=True)))
def test_a_part_of_the_vocabulary_goes_through_both_operators(host, mode, tail, span):
    launches, case = host(), losses_case()
    begin, end = span
    others = [statistics(case, 0, begin), statistics(case, end, 333)]

    def all_max(x):
        place = 0 if x.ndim == 2 else 1
        return ops.maximum(ops.maximum(x, others[0][place]), others[1][place])

    def all_sum(x):
        return x + others[0][2] + others[1][2]

    def run(logits, *rest):
        return topk_kl_of_part(logits, *rest, begin, 333, all_max, all_sum, 2.0, tail)

    part = Tensor(np.ascontiguousarray(case[0][:, begin:end]))
    outputs = (ms.jit(run) if mode == "graph" else run)(part, *map(Tensor, case[1:]))
    expected = losses_reference(torch.tensor(case[0]).double(), *case[1:], 2.0, tail)
    check_losses([as_double(output) for output in outputs], [*expected[:4], expected[4][:, begin:end]], 0)
    assert launches == {"PanguTopkKlStats": 1, "PanguTopkKlFromStats": 1}


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_more_than_64_teacher_tokens_are_refused_where_the_operator_serves(host, mode):
    host()
    case = [Tensor(array) for array in losses_case(k=65)]
    with pytest.raises(ValueError, match="topk_kl: teacher_ids_NK has K=65 tokens, expected at most 64 of the AscendC"):
        (ms.jit(topk_kl) if mode == "graph" else topk_kl)(*case)
    kernels.select("reference", [], "CPU")
    assert np.isfinite(topk_kl(*case)[1].asnumpy()).all()


# ---- Attention -------------------------------------------------------------------------------------------------------

def attention_reference(q, k, v, ends, scale):
    """Torch double, a document at a time: out [T, N, H] and the logarithm of each softmax's sum, [N, T]."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    outs, sums, start = [], [], 0
    for end in ends:
        scores = torch.einsum("inh,jnh->nij", q[start:end], k[start:end]) * scale
        scores = scores.masked_fill(torch.ones(end - start, end - start).triu(1).bool(), -torch.inf)
        outs.append(torch.einsum("nij,jnh->inh", torch.softmax(scores, -1), v[start:end]))
        sums.append(scores.logsumexp(-1))
        start = end
    return torch.cat(outs), torch.cat(sums, 1)


def attention_case(num_tokens=100, num_heads=2, num_kv_heads=1, head_dim=64):
    random = np.random.default_rng(0)
    q, k, v, direction = (random.normal(0, 1, (num_tokens, heads, head_dim)).astype(np.float32)
                          for heads in (num_heads, num_kv_heads, num_kv_heads, num_heads))
    return (q, k, v), direction


@MODES
@HALVES
@pytest.mark.parametrize("sizes", [(100, 2, 1, 64), (37, 2, 2, 128)])
def test_packed_attention_and_its_gradients_match_double_precision(host, mode, dtype, sizes):
    launches = host()
    qkv, direction = attention_case(*sizes)
    ends = (1, 9, 30, sizes[0])
    scale = 0.3

    def loss(q, k, v, cu_seqlens, direction):
        out, lse = packed_attention(q, k, v, cu_seqlens, scale)
        return (ops.cast(out, ms.float32) * direction).sum(), out, lse

    value_and_grad = ms.value_and_grad(loss, (0, 1, 2), has_aux=True)

    def run(*tensors):
        return value_and_grad(*tensors)

    tensors = [*(tensor(array, dtype) for array in qkv), Tensor(np.array([0, *ends, sizes[0]], np.int64)),
               Tensor(direction)]
    (_, out, lse), gradients = (ms.jit(run) if mode == "graph" else run)(*tensors)
    double = [rounded(array, dtype).requires_grad_() for array in qkv]
    expected_out, expected_lse = attention_reference(*double, ends, scale)
    (expected_out * rounded(direction, dtype)).sum().backward()
    assert lse.dtype == ms.float32 and out.dtype == gradients[0].dtype == getattr(ms, dtype)
    np.testing.assert_allclose(lse.asnumpy(), expected_lse.detach().numpy(), rtol=0, atol=1e-4)
    # Probabilities, outputs and, for gradients, the gradient of the scores are rounded once each.
    for ours, theirs, roundings in ((out, expected_out.detach(), 3),
                                    *((ours, x.grad, 6) for ours, x in zip(gradients, double, strict=True))):
        error = np.abs(as_double(ours) - theirs.numpy()).max()
        assert error <= roundings * EPS[dtype] * np.abs(theirs.numpy()).max(), error
    assert launches == {"PanguPackedAttention": 1, "PanguPackedAttentionGrad": 1}


@HALVES
def test_attention_of_float32_tensors_is_that_of_the_runs_type(host, dtype):
    launches = host(dtype)
    qkv, _ = attention_case()
    out = attention(*map(Tensor, qkv), Tensor(np.array([0, 30, 100], np.int64)), 100).asnumpy()
    assert out.dtype == np.float32 and launches == {"PanguPackedAttention": 1}
    expected, _ = attention_reference(*(rounded(array, dtype) for array in qkv), (30, 100), 64**-0.5)
    assert np.abs(out - expected.numpy()).max() <= 3 * EPS[dtype] * expected.abs().max()


def test_on_910b_the_operator_takes_rows_of_more_documents_than_flash_attention(host):
    """Which of the two serves, decided as on a device; both run on the host."""
    launches = host(chip="ascend910b", kernels_="native", device="Ascend")
    qkv, _ = attention_case(num_tokens=1100, num_heads=1)
    for num_documents in (1024, 1025):
        ends = (*range(1, num_documents), 1100)
        launches.clear()
        # flash_attention_score, here that of the CPU library, takes float32 as well.
        tensors = [tensor(array, "float16") for array in qkv]
        out = attention(*tensors, Tensor(np.array([0, *ends], np.int64)), 1100)
        expected, _ = attention_reference(*(rounded(array, "float16") for array in qkv), ends, 64**-0.5)
        assert np.abs(as_double(out) - expected.numpy()).max() <= 3 * EPS["float16"] * expected.abs().max()
        assert launches == ({} if num_documents == 1024 else {"PanguPackedAttention": 1})


def test_without_the_operator_910b_refuses_what_flash_attention_does_not_take(mindspore_cpu):
    kernels.select("native", [], "Ascend", ascendc=kernels.AscendC("ascend910b", missing="build it with this"))
    try:
        qkv, _ = attention_case(num_tokens=1100)
        lengths = Tensor(np.arange(1101))
        with pytest.raises(ValueError, match="cu_seqlens_C has 1100 documents, .* at most 1024.* build it with this"):
            attention(*(tensor(array, "float16") for array in qkv), lengths, 1100)
        with pytest.raises(ValueError, match="q has head size 24, flash_attention_score takes multiples of 16"):
            attention(*(tensor(array[:, :, :24], "float16") for array in qkv), Tensor(np.array([0, 1100])), 1100)
    finally:
        kernels.select("reference", [], "CPU")


@pytest.mark.parametrize(("chip", "change", "scale", "message"), [
    ("ascend910b", lambda x: x[..., :32], 1.0, r"q has head size 32, expected one of \(64, 128\)"),
    ("ascend910b", lambda x: x.astype(np.float32), 1.0, "q is float32, expected float16 or bfloat16"),
    ("ascend310b", "bfloat16", 1.0, "q is bfloat16, expected float16"),
    ("ascend910b", lambda x: x, 0.0, "scale is 0.0, expected a positive number"),
    ("ascend910b", lambda x: x, -1.0, "scale is -1.0, expected a positive number"),
    ("ascend910b", lambda x: x, float("nan"), "scale is nan, expected a positive number"),
    ("ascend910b", lambda x: x, float("inf"), "scale is inf, expected a positive number"),
])
def test_what_packed_attention_does_not_take_is_named_before_a_launch(host, chip, change, scale, message):
    launches = host(chip=chip)
    qkv = [array.astype(np.float16) for array in attention_case()[0]]
    tensors = [tensor(array, change) if isinstance(change, str) else Tensor(change(array)) for array in qkv]
    with pytest.raises(ValueError, match="packed_attention: " + message):
        packed_attention(*tensors, Tensor(np.array([0, 100])), scale)
    assert not launches


class Decoding(nn.Cell):
    """Tokens [steps, B, heads, H] one after the other, in one graph."""

    def __init__(self, k_cache, v_cache):
        super().__init__()
        self.k_cache, self.v_cache = Parameter(k_cache, name="k_cache"), Parameter(v_cache, name="v_cache")

    def construct(self, q, k, v, positions_B):
        i = ops.zeros((), ms.int32)
        out = ops.zeros_like(q)
        while i < q.shape[0]:
            attended = decode_attention(q[i], k[i], v[i], self.k_cache, self.v_cache, positions_B)
            out = ops.tensor_scatter_update(out, i.reshape(1, 1), ops.expand_dims(attended, 0))
            positions_B = positions_B + 1
            i = i + 1
        return out


@MODES
@pytest.mark.parametrize("cache_dtype", ["float16", "float32"])
def test_decode_attention_writes_the_caches_and_matches_double_precision(host, mode, cache_dtype):
    launches = host("float16", "ascend310b")
    random = np.random.default_rng(0)
    batch, steps, num_heads, num_kv_heads, cache_len, head_dim = 2, 3, 4, 2, 80, 64
    caches = [random.normal(0, 1, (batch, num_kv_heads, cache_len, head_dim)).astype(np.float16) for _ in range(2)]
    q, k, v = (random.normal(0, 1, (steps, batch, heads, head_dim)).astype(np.float16)
               for heads in (num_heads, num_kv_heads, num_kv_heads))
    first = np.array([0, 70], np.int32)
    decoding = Decoding(*(tensor(cache, cache_dtype) for cache in caches))
    run = ms.jit(decoding.construct) if mode == "graph" else decoding.construct
    out = run(*(tensor(array, cache_dtype) for array in (q, k, v)), Tensor(first))
    for step in range(steps):
        for cache, new in zip(caches, (k, v), strict=True):
            cache[np.arange(batch), :, first + step] = new[step]
        for b, position in enumerate(first + step):
            keys, values = (torch.tensor(cache[b, :, :position + 1].astype(np.float64)).transpose(0, 1)
                            for cache in caches)
            every = torch.tensor(np.repeat(q[step, b][None], position + 1, 0).astype(np.float64))
            expected = attention_reference(every, keys, values, (position + 1,), head_dim**-0.5)[0][-1].numpy()
            error = np.abs(as_double(out)[step, b] - expected).max()
            assert error <= 3 * EPS["float16"] * max(1, np.abs(expected).max())
    for parameter, cache in ((decoding.k_cache, caches[0]), (decoding.v_cache, caches[1])):
        np.testing.assert_array_equal(parameter.asnumpy().astype(np.float16), cache)
    assert launches == {"PanguDecodeAttention": steps}


def test_a_group_of_more_than_16_heads_is_refused_by_decode_attention(host):
    launches = host("float16", "ascend310b")
    q, k, cache = (Tensor(np.zeros(shape, np.float16)) for shape in ((1, 17, 64), (1, 1, 64), (1, 1, 8, 64)))
    with pytest.raises(ValueError, match="decode_attention: q has 17 heads per key/value head, expected at most 16"):
        decode_attention(q, k, k, Parameter(cache, name="k"), Parameter(cache, name="v"), Tensor([0], ms.int32))
    assert not launches


# ---- Training --------------------------------------------------------------------------------------------------------

CONFIG = ModelConfig(hidden_size=48, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=64, intermediate_size=64,
                     vocab_size=300, max_seq_len=64, rope_theta=1e4, eos_id=2)
SEQ_LEN, NUM_STEPS, LR = 32, 5, 1e-3


def training_samples(kind):
    random = np.random.default_rng(0)
    samples = tokenized_to_samples([(random.integers(3, 300, length), np.arange(length) >= 3)
                                    for length in (20, 9, 30, 14, 25, 17, 12, 28)])
    if kind == "cross_entropy":
        return samples
    targets = samples.tokens[samples.is_target]
    teacher = random.normal(0, 2, (len(targets), 300))
    teacher[np.arange(len(targets)), targets] += 4
    teacher -= np.log(np.exp(teacher).sum(-1, keepdims=True))
    ids = np.argsort(-teacher, -1)[:, :10]
    return samples._replace(extras={"teacher_ids": ids.astype(np.int32),
                                    "teacher_logprobs": np.take_along_axis(teacher, ids, -1).astype(np.float32)})


def train(kind, mode):
    """Losses of some steps from the same weights: two micro-batches a step, the loss in chunks, clipping and AdamW."""
    model = Pangu(CONFIG, seed=0)
    if kind == "cross_entropy":
        loss_fn, metric_names = language_model.make_loss(model, SEQ_LEN, 24), language_model.METRICS
    else:
        loss_fn, metric_names = distill.make_loss(model, DistillConfig(), SEQ_LEN, 24), distill.METRICS
    parameters = ParameterTuple(model.trainable_params())
    gradient_step = make_gradient_step(loss_fn, parameters, 1 + len(metric_names))
    optimizer = AdamW(parameters, TrainConfig(steps=NUM_STEPS, rows_per_step=2, micro_batch_rows=1, lr=LR))

    def training_step(hyperparameters, num_micro_batches, *batch):
        loss, metrics, grads = gradient_step(num_micro_batches, *batch)
        norm = global_norm(grads)
        scale = 1.0 / (ops.maximum(norm, metrics[0]))
        return ops.depend(loss, optimizer(grads, scale, hyperparameters)) / metrics[0]

    step = ms.jit(training_step) if mode == "graph" else training_step
    batches = PackedBatches(training_samples(kind), seq_len=SEQ_LEN, rows_per_step=2, micro_batch_rows=1, pad_id=0,
                            seed=0)
    return [float(step(optimizer.hyperparameters(i, LR), Tensor(batch.num_micro_batches),
                       *map(Tensor, batch.arrays())).asnumpy())
            for i, batch in zip(range(NUM_STEPS), batches, strict=False)]


@pytest.mark.parametrize(("kind", "dtype", "mode"), [
    ("distillation", "bfloat16", "graph"), ("distillation", "float16", "graph"), ("distillation", "bfloat16", "eager"),
    ("cross_entropy", "bfloat16", "graph"), ("cross_entropy", "float16", "graph")])
def test_training_through_the_operators_has_the_losses_of_the_cpu_library(host, cpu_library, kind, dtype, mode):
    launches = host(dtype)
    # What products round their operands to stays the same; the CPU library has no float16.
    cpu_library.pangu_set_bf16_products(int(dtype == "bfloat16"))
    try:
        ours = train(kind, mode)
        kernels.select("native", [], "CPU", cpu_library.path)
        theirs = train(kind, mode)
    finally:
        cpu_library.pangu_set_bf16_products(0)
    print(kind, dtype, mode, "largest difference of a loss", np.abs(np.subtract(ours, theirs)).max())
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)
    assert theirs[-1] < theirs[0]
    # Two layers in each of two micro-batches; the supervised positions of a row, at most 29, in chunks of 24.
    num_rows = 2 * NUM_STEPS
    assert launches["PanguPackedAttention"] == launches["PanguPackedAttentionGrad"] == 2 * num_rows
    assert launches["PanguTopkKl"] == 2 * num_rows


def test_a_recipe_runs_through_the_operators_by_the_public_way(tmp_path):
    overrides = ["recipe=sft_reasoning", "scale=smoke", "run.kernels=ascendc_host", "run.precision=bfloat16",
                 "model.head_dim=64", "data.num_examples=24", "data.num_heldout=4", "train.steps=3"]
    done = subprocess.run([sys.executable, "-m", "mindpangu.train", *overrides], cwd=tmp_path, capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    table = {line.split()[0]: line.split(maxsplit=2)[1:] for line in done.stdout.splitlines() if line.startswith("  ")}
    on_model = "of ascend_kernels, on a model of the 910B"
    for op, operator in (("attention", "PanguPackedAttention"), ("cross_entropy", "PanguTopkKl"),
                         ("topk_kl", "PanguTopkKl")):
        assert table[op] == ["ascendc_host", f"{operator} {on_model}"]
    assert table["head_loss"][0] == "reference" and table["linear"][0] == "native"
    rows = [json.loads(line) for line in next(tmp_path.glob("runs/*/metrics.jsonl")).read_text().splitlines()]
    losses = [row["heldout/loss"] for row in rows if "heldout/loss" in row]
    assert len(losses) == 2 and losses[1] < losses[0] - 0.5


@pytest.mark.parametrize(("overrides", "words"), [
    (["run.device=Ascend", "run.precision=bfloat16"], ["run.kernels=ascendc_host with run.device=Ascend", "on a CPU"]),
    ([], ["run.precision with run.kernels=ascendc_host='float32'", "bfloat16", "float16"]),
    (["run.precision=bfloat16"], ["model.head_dim=32", "64 or 128", "run.reference_ops=[attention]"]),
])
def test_a_run_that_the_operators_cannot_serve_is_refused_before_it_starts(overrides, words):
    with pytest.raises(ValueError) as error:
        load_recipe(["recipe=sft_reasoning", "run.kernels=ascendc_host", *overrides])
    assert all(word in str(error.value) for word in words), error.value


# ---- On Ascend -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("chip", "missing", "native", "by_operators"), [
    ("ascend910b", None, {"attention", "rms_norm", "swiglu"}, {"topk_kl", "cross_entropy"}),
    ("ascend910b", "build it", {"attention", "rms_norm", "swiglu"}, set()),
    ("ascend310b", None, set(), {"attention", "cross_entropy", "decode_attention", "topk_kl"}),
    ("ascend310b", "build it", set(), set()),
    ("ascend910_93", "not for it", {"attention", "rms_norm", "swiglu"}, set()),
])
def test_a_chip_has_the_operators_only_where_their_package_is(chip, missing, native, by_operators):
    chosen = kernels.select("native", [], "Ascend", ascendc=kernels.AscendC(chip, missing=missing))
    try:
        assert {op for op, kernel in chosen.items() if kernel == "native"} == native
        assert {op for op, kernel in chosen.items() if kernel == "ascendc"} == by_operators
        assert set(chosen.values()) <= {"native", "ascendc", "reference"} and set(chosen) == set(kernels.OPS)
        turned_off = kernels.select("native", list(kernels.OPS), "Ascend", ascendc=kernels.AscendC(chip))
        assert set(turned_off.values()) == {"reference"}
    finally:
        kernels.select("reference", [], "CPU")


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_what_mindspore_is_told_of_an_operator_is_its_definition(source):
    definition = compile_op(source).definition()
    operands, inputs, attributes, outputs = ascendc.SIGNATURES[definition["type"]]
    assert list(inputs) == [param["name"] for param in definition["inputs"]]
    assert attributes == {attr["name"]: attr["type"] for attr in definition["attrs"]}
    assert list(attributes) == [attr["name"] for attr in definition["attrs"]]
    # CANN's call has one parameter for an input that is updated, and no output for it.
    params = definition["inputs"] + [param for param in definition["outputs"] if param["name"] not in inputs]
    assert list(outputs) == [param["name"] for param in params[len(inputs):]]
    for place, operand in enumerate(operands):
        assert [kind or operand for kind in (*inputs.values(), *outputs.values())] == [
            param["dtypes"][place] for param in params]
    assert all(len(param["dtypes"]) == len(operands) for param in params)


# MindSpore's own front end, told that the device is Ascend.
FRONT_END = """
import json
from mindspore import context

get_context = context.get_context
context.get_context = lambda name: "Ascend" if name == "device_target" else get_context(name)
from mindpangu.ops import ascendc, kernels

def first(*inputs):
    return inputs[0]

kernels.select("native", [], "Ascend", ascendc=kernels.AscendC("ascend910b"))
primitives = {op_type: ascendc.custom(op_type, out_shape=first, out_dtype=first) for op_type in ascendc.SIGNATURES}
names = "func_name", "input_names", "output_names", "custom_inputs_type", "custom_callback_func"
print(json.dumps({op_type: {name: primitive.attrs[name] for name in names}
                  for op_type, primitive in primitives.items()}))
"""


def test_mindspore_calls_the_operators_as_cann_declares_them(tmp_path):
    """With a made-up package whose headers follow CANN's rules for generated ones. Nothing here ran on a device."""
    (tmp_path / "include/acl").mkdir(parents=True)
    (tmp_path / "include/acl/acl_base.h").write_text("#include <cstdint>\ntypedef int aclDataType;\n")
    package = tmp_path / "opp/vendors/pangu"
    (package / "op_api/include").mkdir(parents=True)
    definitions = [compile_op(source).definition() for source in SOURCES]
    types = {}
    for definition in definitions:
        inputs = [param["name"] for param in definition["inputs"]]
        outputs = [param["name"] for param in definition["outputs"] if param["name"] not in inputs]
        declared = [*(f"aclTensor *{name}" for name in inputs),
                    *(f"{({'float': 'double', 'int': 'int64_t'}.get(attr['type'], attr['type']))} {attr['name']}"
                      for attr in definition["attrs"]),
                    *(f"const aclTensor *{name}Out" for name in outputs)]
        types[definition["type"]] = ["aclTensor*" if "aclTensor" in text else text.split()[0] for text in declared]
        declared += ["uint64_t *workspaceSize", "aclOpExecutor **executor"]
        (package / f"op_api/include/aclnn_{definition['kernel']}.h").write_text(
            f"aclnnStatus {definition['aclnn']}GetWorkspaceSize(\n    " + ",\n    ".join(declared) + ");\n")
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "GLOG_v": "3", "ASCEND_OPP_PATH": f"{tmp_path}/opp",
                   "ASCEND_CUSTOM_OPP_PATH": str(package)}
    done = subprocess.run([sys.executable, "-c", FRONT_END], cwd=tmp_path, env=environment, capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == {definition["type"] for definition in definitions}
    for definition in definitions:
        attrs = found[definition["type"]]
        assert attrs["func_name"] == definition["aclnn"]
        assert attrs["input_names"] == [param["name"] for param in definition["inputs"] + definition["attrs"]]
        assert attrs["custom_inputs_type"] == types[definition["type"]]
        # The function that MindSpore generated for the call is compiled.
        assert (tmp_path / attrs["custom_callback_func"].partition(":")[0]).is_file()
