"""Top-k KL and cross-entropy against torch autograd in double precision, and against the gradients on paper."""

import contextlib

import mindspore as ms
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mindspore import Tensor

from mindpangu.ops.topk_kl import TAILS, topk_kl, topk_kl_of_part

pytestmark = pytest.mark.usefixtures("kernel")
# MindSpore's exp on CPU has a relative error of up to 5e-6; values and gradients here are sums of a few such numbers
# of size 1 times log-ratios of up to 10. The error of the teacher's tail 1 - P grows by 1 / sqrt(tail) at temperature
# 2, so that the cases below keep tails of at least 0.02.
ATOL = 2e-5


def log_softmax(logits):
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def top_k(logprobs_NV, k):
    """Ids and float32 log-probabilities of the k largest, largest first."""
    ids = np.argsort(-logprobs_NV, -1)[:, :k].astype(np.int32)
    return ids, np.take_along_axis(logprobs_NV, ids, -1).astype(np.float32)


def random_case(seed=0, num_positions=6, vocab_size=30, k=5):
    """Student logits and a teacher near them, as after fine-tuning: logits, ids, log-probabilities, labels."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 2, (num_positions, vocab_size)).astype(np.float32)
    teacher = logits + random.normal(0, 1, logits.shape)
    ids, logprobs = top_k(log_softmax(teacher), k)
    return logits, ids, logprobs, random.integers(0, vocab_size, num_positions).astype(np.int32)


def reference(logits_NV, ids_NK, logprobs_NK, labels_N, temperature, tail):
    """ce_N and kl_N from a torch double tensor of logits, by the definition."""
    student = torch.log_softmax(logits_NV, -1)
    ce_N = -student.gather(1, torch.tensor(labels_N, dtype=torch.long)[:, None])[:, 0]
    ids = torch.tensor(ids_NK, dtype=torch.long)
    others = torch.ones_like(logits_NV, dtype=torch.bool).scatter(1, ids, False)
    p = torch.tensor(logprobs_NK, dtype=torch.float64)
    q = student.gather(1, ids)
    if others.any():
        p = torch.cat([p, torch.log1p(-p.exp().sum(-1, keepdim=True))], 1)
        q = torch.cat([q, student.masked_fill(~others, -torch.inf).logsumexp(-1, keepdim=True)], 1)
    p, q = torch.log_softmax(p / temperature, -1), torch.log_softmax(q / temperature, -1)
    if tail != "bucket":
        p, q = p[:, :ids.shape[1]], q[:, :ids.shape[1]]
    if tail.startswith("renormalised"):
        p = p - p.logsumexp(-1, keepdim=True)
    if tail == "renormalised_both":
        q = q - q.logsumexp(-1, keepdim=True)
    return ce_N, (p.exp() * (p - q)).sum(-1) * temperature**2


def run(logits, ids, logprobs, labels, ce_weights, kl_weights, temperature=1.0, tail="bucket"):
    """ce_N, kl_N, teacher_mass_N, agreement_N, dlogits_NV as arrays."""
    tensors = [Tensor(np.asarray(array)) for array in (logits, ids, logprobs, labels.astype(np.int32))]
    weights = [Tensor(np.asarray(array, np.float32)) for array in (ce_weights, kl_weights)]
    return [out.asnumpy() for out in topk_kl(tensors[0], tensors[3], *tensors[1:3], *weights, temperature, tail)]


def check(outputs, logits, ids, logprobs, labels, ce_weights, kl_weights, temperature, tail):
    ce, kl, teacher_mass, agreement, dlogits = outputs
    double = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    expected_ce, expected_kl = reference(double, ids, logprobs, labels, temperature, tail)
    (expected_ce * torch.tensor(ce_weights) + expected_kl * torch.tensor(kl_weights)).sum().backward()
    np.testing.assert_allclose(ce, expected_ce.detach().numpy(), rtol=0, atol=ATOL)
    np.testing.assert_allclose(kl, expected_kl.detach().numpy(), rtol=0, atol=ATOL * max(1, temperature**2))
    np.testing.assert_allclose(dlogits, double.grad.numpy(), rtol=0, atol=ATOL * max(1, temperature**2))
    np.testing.assert_allclose(teacher_mass, np.exp(logprobs.astype(np.float64)).sum(-1), rtol=0, atol=ATOL)
    assert np.array_equal(agreement, (logits.argmax(-1) == ids[:, 0]).astype(np.float32))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("tail", TAILS)
def test_values_and_gradient_match_double_precision(tail, temperature):
    for seed, k in enumerate((1, 5, 8)):
        case = random_case(seed, k=k)
        assert np.exp(case[2]).sum(-1).max() < 0.98
        random = np.random.default_rng(seed)
        weights = [random.uniform(0, 2, 6).astype(np.float32) for _ in range(2)]
        check(run(*case, *weights, temperature, tail), *case, *weights, temperature, tail)


def test_compiled_graphs_match_double_precision():
    case, weights = random_case(), np.linspace(0, 1, 12, dtype=np.float32).reshape(2, 6)

    @ms.jit
    def all_tails(logits, labels, ids, logprobs, ce_weights, kl_weights):
        outputs = ()
        for tail in TAILS:
            outputs = outputs + (topk_kl(logits, labels, ids, logprobs, ce_weights, kl_weights, 2.0, tail),)
        return outputs

    logits, ids, logprobs, labels = case
    outputs = all_tails(*map(Tensor, (logits, labels, ids, logprobs, *weights)))
    for tail, output in zip(TAILS, outputs, strict=True):
        check([tensor.asnumpy() for tensor in output], *case, *weights, 2.0, tail)


@pytest.mark.parametrize(("tail", "on_paper"), [
    ("bucket", lambda p, q, P, Q: q - p),
    ("renormalised_teacher", lambda p, q, P, Q: q - p / P),
    ("renormalised_both", lambda p, q, P, Q: q / Q - p / P),
    ("truncated", lambda p, q, P, Q: P * q - p),
])
def test_gradient_on_the_top_k_logits_is_the_one_on_paper(tail, on_paper):
    logits, ids, logprobs, labels = random_case()
    dlogits = run(logits, ids, logprobs, labels, np.zeros(6), np.ones(6), 1.0, tail)[-1]
    p, q = np.exp(logprobs.astype(np.float64)), np.exp(np.take_along_axis(log_softmax(logits), ids, -1))
    expected = on_paper(p, q, p.sum(-1, keepdims=True), q.sum(-1, keepdims=True))
    np.testing.assert_allclose(np.take_along_axis(dlogits, ids, -1), expected, rtol=0, atol=ATOL)


def test_bucket_and_both_renormalised_are_never_negative():
    for tail in ("bucket", "renormalised_both"):
        case = random_case(num_positions=500, k=4)
        assert (run(*case, np.zeros(500), np.ones(500), 1.0, tail)[1] > 0).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("tail", ["bucket", "renormalised_both"])
def test_zero_where_student_and_teacher_agree(tail, temperature):
    logits, _, _, labels = random_case()
    ids, logprobs = top_k(log_softmax(logits), 5)
    _, kl, _, agreement, dlogits = run(logits, ids, logprobs, labels, np.zeros(6), np.ones(6), temperature, tail)
    assert np.abs(kl).max() < ATOL and np.abs(dlogits).max() < ATOL and agreement.all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 10.0])
@pytest.mark.parametrize("tail", TAILS)
def test_with_the_whole_vocabulary_it_is_the_full_kl(tail, temperature):
    logits, ids, logprobs, labels = random_case(k=30)
    _, kl, teacher_mass, _, dlogits = run(logits, ids, logprobs, labels, np.zeros(6), np.ones(6), temperature, tail)
    teacher = np.zeros(logits.shape)
    np.put_along_axis(teacher, ids, logprobs, -1)
    p, q = log_softmax(teacher / temperature), log_softmax(logits / np.float64(temperature))
    expected = (np.exp(p) * (p - q)).sum(-1) * temperature**2
    # t^2 multiplies both the value and its rounding.
    np.testing.assert_allclose(kl, expected, rtol=0, atol=ATOL * max(1, temperature**2))
    np.testing.assert_allclose(dlogits, (np.exp(q) - np.exp(p)) * temperature, rtol=0, atol=ATOL * max(1, temperature))
    np.testing.assert_allclose(teacher_mass, 1, rtol=0, atol=ATOL)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("tail", TAILS)
def test_a_student_with_all_its_mass_on_the_top_k_is_right(tail, temperature):
    # Student's tail about 1e-9 (1 - Q is 0 in float32), teacher's tail 0.1 (row 0) and 0.02 (row 1).
    logits = np.zeros((2, 20), np.float32)
    logits[:, :3] = [23.5, 22.5, 22.0]
    teacher = np.log(np.array([[0.5, 0.3, 0.1], [0.6, 0.3, 0.08]]))
    case = logits, np.tile(np.arange(3, dtype=np.int32), (2, 1)), teacher.astype(np.float32), np.array([0, 5])
    assert 1e-10 < 1 - np.exp(log_softmax(logits))[0, :3].sum() < 3e-9
    check(run(*case, np.ones(2), np.ones(2), temperature, tail), *case, np.ones(2), np.ones(2), temperature, tail)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("tail", TAILS)
def test_extreme_inputs_stay_finite(tail, temperature):
    # A teacher that is certain of one token, of all K (mass 1 + 6e-8 after rounding), and a row of padding: all zero.
    logits = np.random.default_rng(0).normal(0, 2, (4, 12)).astype(np.float32)
    logits[1, 4] = 500  # the student is certain of another token
    logits[2] = 0
    ids = np.array([[0, 1, 2], [0, 1, 2], [3, 4, 5], [0, 0, 0]], np.int32)
    logprobs = np.array([[0, -80, -90], [0, -80, -90], [np.log(1 / 3) + 1e-7] * 3, [0, 0, 0]], np.float32)
    weights = np.array([1, 1, 1, 0], np.float32)
    outputs = run(logits, ids, logprobs, np.zeros(4, np.int32), weights, weights, temperature, tail)
    assert all(np.isfinite(output).all() for output in outputs)
    assert not outputs[-1][3].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), num_positions=st.integers(1, 5), vocab_size=st.integers(1, 1500), tail=st.sampled_from(TAILS),
       temperature=st.sampled_from([0.5, 1.0, 2.0]), seed=st.integers(0, 99))
def test_any_size_matches_double_precision(dtype, data, num_positions, vocab_size, tail, temperature, seed):
    k = data.draw(st.sampled_from(sorted({1, min(7, vocab_size), min(50, vocab_size)})))
    random = np.random.default_rng(seed)
    logits = random.normal(0, 1, (num_positions, vocab_size)).astype(np.float32)
    if dtype == "bfloat16":
        logits = torch.tensor(logits).bfloat16().float().numpy()
    # The student is what the test is about: the teacher's tail is a comfortable 0.1 or more.
    teacher = 0.9 * random.dirichlet(np.ones(k), num_positions)
    ids = np.argsort(random.random(logits.shape), -1)[:, :k].astype(np.int32)
    if k == vocab_size:
        teacher /= 0.9
    labels = np.where(random.random(num_positions) < 0.5, ids[:, 0], random.integers(0, vocab_size, num_positions))
    weights = random.uniform(0, 1, (2, num_positions)).astype(np.float32)
    case = logits, ids, np.log(teacher).astype(np.float32), labels
    outputs = topk_kl(Tensor(logits, getattr(ms, dtype)), Tensor(labels.astype(np.int32)), *map(Tensor, case[1:3]),
                      *map(Tensor, weights), temperature, tail)
    ce, kl, _, agreement, dlogits = [ms.ops.cast(output, ms.float32).asnumpy() for output in outputs]
    double = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    expected_ce, expected_kl = reference(double, *case[1:], temperature, tail)
    (expected_ce * torch.tensor(weights[0]) + expected_kl * torch.tensor(weights[1])).sum().backward()
    # Log-ratios reach 15; a bfloat16 gradient is rounded once, by at most 2^-8 of its value.
    scale = max(1, temperature**2, 1 / temperature)
    np.testing.assert_allclose(ce, expected_ce.detach().numpy(), rtol=1e-5, atol=ATOL)
    np.testing.assert_allclose(kl, expected_kl.detach().numpy(), rtol=1e-5, atol=2 * ATOL * scale)
    np.testing.assert_allclose(dlogits, double.grad.numpy(), rtol=2**-8 if dtype == "bfloat16" else 0,
                               atol=2 * ATOL * scale)
    assert np.array_equal(agreement, (logits.argmax(-1) == ids[:, 0]).astype(np.float32))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("tail", TAILS)
def test_a_token_that_the_teacher_excludes_counts_as_probability_zero(tail, temperature):
    logits, ids, logprobs, labels = random_case()
    logprobs[:, 3:] = -np.inf
    outputs = run(logits, ids, logprobs, labels, np.ones(6), np.ones(6), temperature, tail)
    logprobs[:, 3:] = -200  # e^-200 is no float32, but a double
    check(outputs, logits, ids, logprobs, labels, np.ones(6), np.ones(6), temperature, tail)


@pytest.mark.parametrize("tail", TAILS)
def test_logits_of_ten_thousand_keep_their_differences(tail):
    logits, ids, logprobs, labels = random_case()
    far = logits.copy()
    far[:3] += 1e4
    far[3:] -= 1e4
    outputs = run(far, ids, logprobs, labels, np.ones(6), np.ones(6), 1.0, tail)
    double = torch.tensor(far, dtype=torch.float64, requires_grad=True)
    ce, kl = reference(double, ids, logprobs, labels, 1.0, tail)
    (ce + kl).sum().backward()
    # The spacing of float32 at 1e4 is 1e-3: a log-sum-exp has it, differences do not.
    for ours, theirs in zip((outputs[0], outputs[1], outputs[4]), (ce, kl, double.grad), strict=True):
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=0, atol=ATOL)


def test_equal_logits_agree_where_the_teachers_token_is_the_first():
    ids = np.array([[1, 0], [0, 1]], np.int32)
    logprobs = np.log(np.full((2, 2), 0.4, np.float32))
    outputs = run(np.zeros((2, 5), np.float32), ids, logprobs, np.zeros(2), np.ones(2), np.ones(2))
    assert outputs[3].tolist() == [0, 1]


@pytest.mark.parametrize(("arguments", "message"), [({"temperature": 0.0}, "temperature=0.0: expected a positive"),
                                                    ({"tail": "bucked"}, "tail='bucked': expected one of")])
def test_a_wrong_temperature_or_tail_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        run(*random_case(), np.ones(6), np.ones(6), **arguments)


def test_without_gradient_the_losses_are_the_same():
    case, weights = random_case(), np.ones((2, 6), np.float32)
    logits, ids, logprobs, labels = map(Tensor, case)
    arguments = (logits, labels, ids, logprobs, *map(Tensor, weights), 2.0)
    expected = run(*case, *weights, 2.0)
    outputs = topk_kl(*arguments, with_gradient=False)
    for ours, theirs in zip(outputs[:4], expected, strict=False):
        np.testing.assert_allclose(ours.asnumpy(), theirs, rtol=0, atol=ATOL)
    assert outputs[4].asnumpy().tolist() == [0]


class _Waiting(Exception):
    """A rank stands at a collective that another rank has not reached."""


def run_ranks(ranks):
    """[rank(all_max, all_sum) for each], all in this process: run again whenever all stand at the next collective."""
    done = []  # results of the collectives so far
    waiting = []

    def collective(reduce, results):
        def call(x):
            for result in results:
                return Tensor(result)
            waiting.append((reduce, x.asnumpy()))
            raise _Waiting

        return call

    while True:
        outputs = []
        for rank in ranks:
            results = iter(done)
            with contextlib.suppress(_Waiting):
                outputs.append(rank(collective(np.max, results), collective(np.sum, results)))
        if not waiting:
            return outputs
        assert len(waiting) == len(ranks) and len({reduce for reduce, _ in waiting}) == 1
        done.append(waiting[0][0]([array for _, array in waiting], axis=0))
        waiting.clear()


@pytest.mark.parametrize(("tail", "vocab_size", "k", "bounds"), [
    ("bucket", 40, 8, (0, 1, 2, 25, 40)), ("renormalised_teacher", 30, 5, (0, 7, 30)),
    ("renormalised_both", 30, 30, (0, 15, 30)), ("truncated", 9, 1, (0, 9))])
def test_ranks_with_parts_of_the_vocabulary_have_the_losses_of_the_whole(tail, vocab_size, k, bounds):
    logits, ids, logprobs, labels = random_case(3, 6, vocab_size, k)
    logits[0, :] = 0  # all tokens equal: the first one is the student's
    ids[1, 0], ids[1, np.argmin(ids[1])] = ids[1].min(), ids[1, 0]
    # The teacher's first token is as likely as one that comes later, of another rank.
    later = np.setdiff1d(np.arange(vocab_size), ids[2])[-1:]
    logits[2, later] = logits[2, ids[2, 0]] = 9
    weights = np.random.default_rng(1).uniform(0, 2, (2, 6)).astype(np.float32)
    rest = [Tensor(array) for array in (labels, ids, logprobs, *weights)]

    def rank(begin, end):
        part = Tensor(np.ascontiguousarray(logits[:, begin:end]))
        return lambda all_max, all_sum: topk_kl_of_part(part, *rest, begin, vocab_size, all_max, all_sum, 2.0, tail)

    parts = [[output.asnumpy() for output in outputs]
             for outputs in run_ranks([rank(*span) for span in zip(bounds[:-1], bounds[1:], strict=True)])]
    for part in parts[1:]:
        for ours, theirs in zip(part[:4], parts[0], strict=False):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=ATOL)
    outputs = [*parts[0][:4], np.concatenate([part[4] for part in parts], 1)]
    check(outputs, logits, ids, logprobs, labels, *weights, 2.0, tail)


def named_case():
    logits, ids, logprobs, labels = random_case()
    ones = np.ones(6, np.float32)
    return {"logits_NV": logits, "labels_N": labels, "teacher_ids_NK": ids, "teacher_logprobs_NK": logprobs,
            "ce_weights_N": ones, "kl_weights_N": ones}


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize(("argument", "change", "message"), [
    ("logits_NV", lambda x: x[:, :0], "logits_NV has 0 columns, expected at least 1"),
    ("logits_NV", lambda x: x[:, :4], "teacher_ids_NK has K=5 tokens, expected at most the vocabulary, 4"),
    ("logits_NV", lambda x: x[0], r"logits_NV has shape \[30\], expected \[any, any\], positions and vocabulary"),
    ("logits_NV", lambda x: x.astype(np.float64), "logits_NV is float64, expected float16 or bfloat16 or float32"),
    ("labels_N", lambda x: x.astype(np.int64), "labels_N is int64, expected int32"),
    ("labels_N", lambda x: x[:5], r"labels_N has shape \[5\], expected \[6\]"),
    ("teacher_ids_NK", lambda x: x.astype(np.int64), "teacher_ids_NK is int64, expected int32"),
    ("teacher_ids_NK", lambda x: x[:, :0], "teacher_ids_NK has 0 columns, expected at least 1"),
    ("teacher_ids_NK", lambda x: x[:3], r"teacher_ids_NK has shape \[3, 5\], expected \[6, any\]"),
    ("teacher_logprobs_NK", lambda x: x[:, :4], r"teacher_logprobs_NK has shape \[6, 4\], expected \[6, 5\]"),
    ("teacher_logprobs_NK", lambda x: x.astype(np.float16), "teacher_logprobs_NK is float16, expected float32"),
    ("ce_weights_N", lambda x: x[:, None], r"ce_weights_N has shape \[6, 1\], expected \[6\]"),
    ("kl_weights_N", lambda x: x.astype(np.float16), "kl_weights_N is float16, expected float32"),
])
def test_an_argument_that_does_not_fit_is_named(mode, argument, change, message):
    case = named_case()
    case[argument] = change(case[argument])
    function = ms.jit(topk_kl) if mode == "graph" else topk_kl
    with pytest.raises(ValueError, match="topk_kl: " + message):
        function(*map(Tensor, case.values()))


def test_a_part_outside_the_vocabulary_is_named():
    tensors = [Tensor(array) for array in named_case().values()]
    for offset, vocab_size in ((-1, 100), (71, 100)):
        with pytest.raises(ValueError, match=f"topk_kl_of_part: offset={offset} and 30 columns of logits_NV, expected"):
            topk_kl_of_part(*tensors, offset, vocab_size, None, None)
