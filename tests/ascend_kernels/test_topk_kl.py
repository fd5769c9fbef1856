"""The top-k KL kernels, run on the host, against torch autograd in double precision; traffic, tiling, sync, errors."""

import functools
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from ascend_kernels.host.harness import compile_kernel, to_dtype, to_float64
from ascend_kernels.host.roofline import PEAKS
from ascend_kernels.host.tiling import TilingError, compile_op
from mindpangu.ops.topk_kl import TAILS

# N rows, V vocabulary, K teacher tokens.
OP = Path(importlib.util.find_spec("ascend_kernels").submodule_search_locations[0]) / "topk_kl"
SOCS = ("ascend910b", "ascend310b")
DTYPES = ("float16", "bfloat16", "float32")
# Losses: |error| / max(1, |loss|); the arithmetic is float32 whatever the logits' type. Gradients: |error| over the
# row's largest, or over a tenth of its weights where that is more, because terms of the weights' size cancel: half a
# unit in the last of 11 and 8 bits for the 16-bit types, which the float32 error before the rounding can push over.
LOSS_ERROR = 2e-6
GRADIENT_ERROR = {"float16": 1.01 * 2.0**-11, "bfloat16": 1.01 * 2.0**-8, "float32": 4e-6}
SMALL_UB = 8192 + 12704 + 20 * 512  # bytes: tiles of 512 16-bit or 256 float32 logits at most


@functools.cache
def host_side(name):
    return compile_op(OP / f"op_host/{name}.cpp")


@functools.cache
def kernel(name, soc, dtype, removable=False):
    return compile_kernel(OP / f"op_kernel/{name}.cpp", soc, {"LOGITS": dtype}, OP / "op_host/pangu_topk_kl_tiling.h",
                          removable=removable)


def run(name, soc, dtype, inputs, outputs, attrs, removed_sync=None, removable=False, **platform):
    """Tile and launch; inputs and outputs are arrays. Returns the report."""
    op = host_side(name)
    definition = op.definition()
    described = []
    for params, arrays in ((definition["inputs"], inputs), (definition["outputs"], outputs)):
        types = [dtype if param["name"] in ("logits", "dlogits") else str(array.dtype)
                 for param, array in zip(params, arrays, strict=True)]
        described.append([(array.shape, type_) for array, type_ in zip(arrays, types, strict=True)])
    tiling = op.tiling(soc, *described, attrs, **platform)
    return kernel(name, soc, dtype, removable).launch(
        tiling.num_blocks, inputs, outputs, tiling.data, tiling_key=tiling.key, workspace_bytes=tiling.workspace_bytes,
        removed_sync=removed_sync)


def loss_outputs(num_rows, dlogits):
    return [np.zeros(num_rows, np.float32) for _ in range(4)] + [dlogits]


def topk_kl(case, soc, dtype, temperature=1.0, tail="bucket", with_gradient=True, in_place=False, **options):
    """PanguTopkKl: its five outputs and the report."""
    logits = case["logits"]
    if in_place:
        logits = dlogits = logits.copy()
    else:
        dlogits = np.zeros_like(logits) if with_gradient else np.zeros(1, logits.dtype)
    inputs = [logits, *(case[name] for name in ("labels", "ids", "logprobs", "ce_weights", "kl_weights"))]
    outputs = loss_outputs(len(logits), dlogits)
    report = run("pangu_topk_kl", soc, dtype, inputs, outputs, [temperature, TAILS.index(tail), with_gradient],
                 **options)
    return outputs, report


def topk_kl_stats(case, soc, dtype, begin, end, **options):
    """PanguTopkKlStats of columns begin to end: rest_max, rest_sum, rest_argmax, top_logits, label_logits."""
    num_rows, num_top = case["ids"].shape
    outputs = [np.zeros(num_rows, np.float32), np.zeros(num_rows, np.float32), np.zeros(num_rows, np.int32),
               np.zeros((num_rows, num_top), np.float32), np.zeros(num_rows, np.float32)]
    part = np.ascontiguousarray(case["logits"][:, begin:end])
    run("pangu_topk_kl_stats", soc, dtype, [part, case["labels"], case["ids"]], outputs, [begin], **options)
    return outputs


def combine(stats):
    """What the ranks' PanguTopkKlStats are together: maxima of all but the sums and the places of the maximum."""
    maxima, sums, argmaxes, tops, labels = (np.stack(parts) for parts in zip(*stats, strict=True))
    rest_max = maxima.max(0)
    rest_sum = (sums * np.exp(maxima - rest_max)).sum(0)
    rest_argmax = np.where(maxima == rest_max, argmaxes, np.iinfo(np.int32).max).min(0)
    return [rest_max, rest_sum, rest_argmax, tops.max(0), labels.max(0)]


def topk_kl_from_stats(case, stats, soc, dtype, begin, end, temperature=1.0, tail="bucket", with_gradient=True,
                       in_place=False, **options):
    """PanguTopkKlFromStats of columns begin to end: its five outputs and the report."""
    part = np.ascontiguousarray(case["logits"][:, begin:end])
    if in_place:
        part = dlogits = part.copy()
    else:
        dlogits = np.zeros_like(part) if with_gradient else np.zeros(1, part.dtype)
    inputs = [part, *(case[name] for name in ("labels", "ids", "logprobs", "ce_weights", "kl_weights")), *stats]
    outputs = loss_outputs(len(part), dlogits)
    report = run("pangu_topk_kl_from_stats", soc, dtype, inputs, outputs,
                 [temperature, TAILS.index(tail), with_gradient, begin, case["logits"].shape[1]], **options)
    return outputs, report


def random_case(seed, dtype, num_rows=5, vocab_size=700, num_top=9):
    """Logits with ties and masked tokens, a teacher near them, labels inside and outside the K, some zero weights."""
    random = np.random.default_rng(seed)
    values = random.normal(0, 3, (num_rows, vocab_size))
    values = np.where(random.random((num_rows, 1)) < 0.4, np.round(values), values)
    logits = to_dtype(values, dtype)
    values = to_float64(logits)
    teacher = values + random.normal(0, 1, values.shape)
    teacher -= np.log(np.exp(teacher).sum(-1, keepdims=True))
    ids = np.argsort(-teacher, -1)[:, :num_top].astype(np.int32)
    logprobs = np.take_along_axis(teacher, ids, -1)
    # The error of the teacher's tail, 1 - P, grows by 1 / tail in its logarithm: keep it at 0.02 or more.
    if num_top < vocab_size:
        logprobs += np.minimum(0, np.log(0.98 / np.exp(logprobs).sum(-1, keepdims=True)))
    labels = random.integers(0, vocab_size, num_rows)
    labels = np.where(random.random(num_rows) < 0.5, ids[:, random.integers(num_top)], labels).astype(np.int32)
    # Masked tokens: outside the K and the label, and one of the K that the teacher excludes as well.
    masked = random.random(logits.shape) < random.choice([0, 0.1, 0.5], (num_rows, 1))
    np.put_along_axis(masked, ids, False, -1)
    if num_top < vocab_size:  # a rest without any token has its own test
        np.put_along_axis(masked, np.argmin(teacher, -1)[:, None], False, -1)
    if 1 < num_top < vocab_size:
        last = ids[:, -1:]
        excluded = (random.random((num_rows, 1)) < 0.3) & (last != labels[:, None])
        np.put_along_axis(masked, last, excluded, -1)
        logprobs[:, -1:] = np.where(excluded, -np.inf, logprobs[:, -1:])
    np.put_along_axis(masked, labels[:, None], False, -1)
    logits = np.where(masked, to_dtype(np.array(-np.inf), dtype), logits)
    weights = [np.where(random.random(num_rows) < 0.3, 0, random.uniform(0.1, 2, num_rows)) for _ in range(2)]
    return {"logits": logits, "labels": labels, "ids": ids, "logprobs": logprobs.astype(np.float32),
            "ce_weights": weights[0].astype(np.float32), "kl_weights": weights[1].astype(np.float32)}


def reference(case, temperature, tail):
    """ce, kl, teacher_mass, agreement, dlogits by the definition, in double precision."""
    logits = torch.tensor(to_float64(case["logits"]), requires_grad=True)
    ids, labels = torch.tensor(case["ids"]).long(), torch.tensor(case["labels"]).long()
    others = torch.ones_like(logits, dtype=torch.bool).scatter(1, ids, False)
    student = torch.log_softmax(logits, -1)
    ce = -student.gather(1, labels[:, None])[:, 0]
    p = torch.tensor(case["logprobs"]).double()
    q = student.gather(1, ids)
    mass = p.exp().sum(-1).clamp(max=1)
    if others.any():
        p = torch.cat([p, torch.log1p(-mass)[:, None]], 1)
        q = torch.cat([q, student.masked_fill(~others, -torch.inf).logsumexp(-1, keepdim=True)], 1)
    p, q = torch.log_softmax(p / temperature, -1), torch.log_softmax(q / temperature, -1)
    if tail != "bucket":
        p, q = p[:, :ids.shape[1]], q[:, :ids.shape[1]]
    if tail.startswith("renormalised"):
        p = p - p.logsumexp(-1, keepdim=True)
    if tail == "renormalised_both":
        q = q - q.logsumexp(-1, keepdim=True)
    possible = p > -torch.inf  # 0 log 0 is 0
    difference = torch.where(possible, p, 0) - torch.where(possible, q, 0)
    kl = (p.exp() * difference).sum(-1) * temperature**2
    (ce * torch.tensor(case["ce_weights"]) + kl * torch.tensor(case["kl_weights"])).sum().backward()
    agreement = np.argmax(to_float64(case["logits"]), -1) == case["ids"][:, 0]
    return [ce.detach().numpy(), kl.detach().numpy(), mass.numpy(), agreement.astype(np.float64), logits.grad.numpy()]


def gradient_error(case, dlogits, expected):
    weights = (np.abs(case["ce_weights"]) + np.abs(case["kl_weights"])).astype(np.float64)[:, None]
    largest = np.maximum(np.abs(expected).max(-1, keepdims=True), weights / 10)
    np.testing.assert_array_equal(dlogits[weights[:, 0] == 0], 0)
    return np.max(np.abs(to_float64(dlogits) - expected) / np.maximum(largest, 1e-30))


def loss_error(losses, expected):
    for ours in losses:
        assert np.isfinite(ours).all()
    return max(np.max(np.abs(ours - theirs) / np.maximum(1, np.abs(theirs)))
               for ours, theirs in zip(losses, expected, strict=True))


def check(case, dtype, outputs, expected):
    """Asserts that the five outputs are near the reference's; returns the two errors."""
    np.testing.assert_array_equal(outputs[3], expected[3])
    found = loss_error(outputs[:3], expected[:3]), gradient_error(case, outputs[4], expected[4])
    assert found[0] <= LOSS_ERROR and found[1] <= GRADIENT_ERROR[dtype], found
    return found


def forms():
    for temperature in (1.0, 2.0):
        for tail in TAILS:
            yield temperature, tail


# K + 1 outcomes in every relation to 64 lanes; V odd, 1, K, K + 1; more rows than a core takes at once, and fewer.
SHAPES = ((5, 700, 9), (1, 1, 1), (3, 64, 64), (2, 65, 64), (9, 1003, 64), (4, 2, 1), (19, 257, 7), (2, 3001, 33))


@pytest.mark.parametrize("soc", SOCS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_and_gradient_match_double_precision(soc, dtype, readme):
    worst = [0, 0]
    for seed, shape in enumerate(SHAPES * 3):
        case = random_case(seed, dtype, *shape)
        for temperature, tail in forms():
            # A small UB: rows of several tiles.
            outputs, _ = topk_kl(case, soc, dtype, temperature, tail, ub_bytes=SMALL_UB)
            found = check(case, dtype, outputs, reference(case, temperature, tail))
            worst = [max(pair) for pair in zip(worst, found, strict=True)]
    print(f"{soc} {dtype}: largest error of losses {worst[0]:.2g}, of gradients {worst[1]:.2g}")
    stated = next(cells for name, *cells in readme.table("logits") if name == dtype)
    for error, cell in zip(worst, stated, strict=False):
        assert 0.8 * float(cell) <= error <= float(cell)


@pytest.mark.parametrize("soc", SOCS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_may_take_the_place_of_the_logits(soc, dtype):
    case = random_case(11, dtype, 9, 1003, 8)
    expected, _ = topk_kl(case, soc, dtype, 2.0, "bucket", ub_bytes=SMALL_UB)
    outputs, _ = topk_kl(case, soc, dtype, 2.0, "bucket", in_place=True, ub_bytes=SMALL_UB)
    for ours, theirs in zip(outputs, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("soc", SOCS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_without_gradient_are_the_same_and_dlogits_is_one_zero(soc, dtype):
    case = random_case(12, dtype, 9, 1003, 8)
    for temperature, tail in forms():
        expected, _ = topk_kl(case, soc, dtype, temperature, tail)
        outputs, report = topk_kl(case, soc, dtype, temperature, tail, with_gradient=False)
        for ours, theirs in zip(outputs[:4], expected, strict=False):
            np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(outputs[4], 0)
        assert report.gm_bytes_read < 1.05 * case["logits"].nbytes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_splitting_the_vocabulary_over_ranks_changes_nothing(dtype, num_ranks):
    for soc, seed, shape in (("ascend910b", 1, (9, 1003, 64)), ("ascend310b", 2, (5, 700, 9)),
                             ("ascend910b", 3, (3, 70, 64)), ("ascend910b", 4, (4, 64, 64)),
                             ("ascend310b", 5, (2, 4, 1))):
        case = random_case(seed, dtype, *shape)
        bounds = [shape[1] * rank // num_ranks for rank in range(num_ranks + 1)]
        ranks = list(zip(bounds[:-1], bounds[1:], strict=True))
        stats = combine([topk_kl_stats(case, soc, dtype, *rank, ub_bytes=SMALL_UB) for rank in ranks])
        values, is_top = to_float64(case["logits"]), np.zeros(shape[:2], bool)
        np.put_along_axis(is_top, case["ids"], True, -1)
        rest = np.where(is_top, -np.inf, values)
        has_rest = np.isfinite(rest).any(-1)
        np.testing.assert_array_equal(stats[0][has_rest], rest.max(-1)[has_rest])
        np.testing.assert_array_equal(stats[2][has_rest], rest.argmax(-1)[has_rest])
        np.testing.assert_array_equal(stats[3], np.take_along_axis(values, case["ids"], -1))
        np.testing.assert_array_equal(stats[4], np.take_along_axis(values, case["labels"][:, None], -1)[:, 0])
        for temperature, tail in forms():
            parts = [topk_kl_from_stats(case, stats, soc, dtype, *rank, temperature, tail, ub_bytes=SMALL_UB)[0]
                     for rank in ranks]
            for part in parts[1:]:
                np.testing.assert_array_equal(part[:4], parts[0][:4])
            outputs = [*parts[0][:4], np.concatenate([part[4] for part in parts], 1)]
            check(case, dtype, outputs, reference(case, temperature, tail))


def test_from_stats_works_in_place_and_without_gradient():
    case = random_case(6, "float16", 20, 1003, 8)
    stats = topk_kl_stats(case, "ascend910b", "float16", 0, 1003)
    expected, _ = topk_kl(case, "ascend910b", "float16", 2.0, "truncated")
    for options in ({}, {"in_place": True}, {"with_gradient": False}):
        outputs, report = topk_kl_from_stats(case, stats, "ascend910b", "float16", 0, 1003, 2.0, "truncated", **options)
        for ours, theirs in zip(outputs[:4], expected, strict=False):
            np.testing.assert_array_equal(ours, theirs)
        if options.get("with_gradient", True):
            np.testing.assert_array_equal(outputs[4], expected[4])
        else:
            assert report.gm_bytes_read < 0.5 * case["logits"].nbytes  # no logit is read


@pytest.mark.parametrize("soc", SOCS)
def test_rest_without_any_token(soc):
    """All tokens outside the K masked: the losses and gradients are those of a vocabulary of the K tokens."""
    case = random_case(13, "float32", 3, 300, 4)
    ids, labels = case["ids"], np.array([1, 0, 3], np.int32)
    top = np.linspace(-2, 3, 12, dtype=np.float32).reshape(3, 4)
    case |= {"logits": np.full((3, 300), -np.inf, np.float32), "labels": ids[np.arange(3), labels],
             "logprobs": np.log(np.full((3, 4), 0.25, np.float32))}
    np.put_along_axis(case["logits"], ids, top, -1)
    small = case | {"logits": top, "ids": np.tile(np.arange(4, dtype=np.int32), (3, 1)), "labels": labels}
    for temperature in (1.0, 2.0):
        outputs, _ = topk_kl(case, soc, "float32", temperature, "renormalised_both")
        dlogits = np.take_along_axis(outputs[4], ids, -1)
        check(small, "float32", [*outputs[:4], dlogits], reference(small, temperature, "renormalised_both"))
        np.put_along_axis(outputs[4], ids, 0, -1)
        np.testing.assert_array_equal(outputs[4], 0)


def test_agreement_goes_to_the_first_of_equal_logits():
    logits = np.zeros((6, 400), np.float32)
    ids = np.array([[5, 7], [5, 7], [300, 2], [300, 2], [0, 399], [5, 7]], np.int32)
    logits[:, 100] = 1
    for row, top in enumerate(((5, 1.0), (5, 0.5), (300, 1.0), (300, 2.0), (0, 1.0), (5, 1.0))):
        logits[row, top[0]] = top[1]
    logits[5, 4] = 1  # before the teacher's first token, in the rest
    case = random_case(0, "float32", 6, 400, 2) | {"logits": logits, "ids": ids}
    for soc in SOCS:
        outputs, _ = topk_kl(case, soc, "float32", ub_bytes=SMALL_UB)
        np.testing.assert_array_equal(outputs[3], [1, 0, 0, 1, 1, 0])
    logits[0, 7] = logits[1, 7] = 3  # another of the K
    assert topk_kl(case, "ascend910b", "float32", ub_bytes=SMALL_UB)[0][3].tolist() == [0, 0, 0, 1, 1, 0]


@pytest.mark.parametrize("soc", SOCS)
def test_rows_that_fill_a_batch_up_stay_finite(soc):
    """Ids 0 throughout, log-probabilities 0, no weight: what batches hold where a row has no target."""
    case = random_case(15, "float16", 9, 1003, 8)
    case["ids"][::2], case["logprobs"][::2], case["labels"][::2] = 0, 0, 0
    case["logits"][::2, 0] = 1
    case["ce_weights"][::2] = case["kl_weights"][::2] = 0
    outputs, _ = topk_kl(case, soc, "float16", ub_bytes=SMALL_UB)
    assert all(np.isfinite(to_float64(values)).all() for values in outputs)
    np.testing.assert_array_equal(outputs[4][::2], 0)
    others = {name: values[1::2] for name, values in case.items()}
    check(others, "float16", [values[1::2] for values in outputs], reference(others, 1.0, "bucket"))


def test_masked_token_that_the_teacher_expects_makes_the_kl_infinite():
    case = random_case(14, "float32", 2, 300, 4)
    case["logits"][0, case["ids"][0, 2]] = -np.inf
    case["logprobs"][0] = case["logprobs"][1]
    case["labels"][:] = case["ids"][:, 0]
    outputs, _ = topk_kl(case, "ascend910b", "float32")
    assert np.isposinf(outputs[1][0]) and np.isfinite(outputs[1][1])
    assert np.isfinite(outputs[4]).all()


@pytest.mark.parametrize("soc", SOCS)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("shape", [(1, 153376, 64), (2, 153375, 64), (3, 20011, 1)])
def test_traffic_is_two_reads_and_one_write(soc, dtype, shape):
    num_rows, vocab_size, num_top = shape
    case = random_case(7, dtype, *shape)
    case["ce_weights"][:] = 1  # a row without weights is read once
    outputs, report = topk_kl(case, soc, dtype)
    moved = report.gm_bytes_read + report.gm_bytes_written
    least = 3 * case["logits"].nbytes + num_rows * (8 * num_top + 32)
    assert least - 16 * num_rows <= moved <= 1.05 * least
    assert report.gm_bytes_written == case["logits"].nbytes + 16 * num_rows
    # Of 64 logits: 10 instructions, 7 for float32, and at most 4% more for the ends of tiles and rows.
    instructions = report.vector_instructions / (num_rows * vocab_size / 64)
    print(f"{soc} {dtype} {shape}: {moved / least:.4f} of the least traffic, {instructions:.2f} instructions per 64 "
          f"logits, {report.ub_bytes_used} bytes of UB")
    if vocab_size > 100000:
        assert instructions <= (7 if dtype == "float32" else 10) + 0.6
        check(case, dtype, outputs, reference(case, 1.0, "bucket"))


@functools.cache
def reports(soc, dtype, num_rows, vocab_size, num_top):
    """Of the operators by name, and of PanguTopkKl without gradient, for rows whose weights are not zero."""
    case = random_case(0, dtype, num_rows, vocab_size, num_top)
    case["ce_weights"][:] = 1
    stats = topk_kl_stats(case, soc, dtype, 0, vocab_size)
    inputs = [case[name] for name in ("logits", "labels", "ids")]
    return {"PanguTopkKl": topk_kl(case, soc, dtype)[1],
            "without gradient": topk_kl(case, soc, dtype, with_gradient=False)[1],
            "PanguTopkKlStats": run("pangu_topk_kl_stats", soc, dtype, inputs, stats, [0]),
            "PanguTopkKlFromStats": topk_kl_from_stats(case, stats, soc, dtype, 0, vocab_size)[1]}


@pytest.mark.parametrize("soc", SOCS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_traffic_is_what_the_readme_says(soc, dtype):
    for num_rows, vocab_size, num_top in ((3, 1003, 1), (11, 700, 64), (2, 20011, 10)):
        size = 4 if dtype == "float32" else 2
        logits, tops = size * vocab_size, 4 * num_top
        rows = {"PanguTopkKl": (2 * logits + 2 * tops + 12, logits + 16),
                "without gradient": (logits + 2 * tops + 12, 16), "PanguTopkKlStats": (logits + tops + 4, tops + 16),
                "PanguTopkKlFromStats": (logits + 3 * tops + 28, logits + 16)}
        for name, report in reports(soc, dtype, num_rows, vocab_size, num_top).items():
            read, written = (bytes_of_row * num_rows for bytes_of_row in rows[name])
            assert report.gm_bytes_read == read
            assert report.gm_bytes_written == written + (size if name == "without gradient" else 0)


def test_readme_states_what_a_row_of_the_vocabulary_costs(readme):
    table = readme.table("chip")
    assert len(table) == len(SOCS) * len(DTYPES)
    for chip, dtype, *cells in table:
        memory, _, vector = PEAKS["ascend" + chip]
        report = reports("ascend" + chip, dtype, 1, 153376, 10)["PanguTopkKl"]
        moved, built_ins = report.gm_bytes_read + report.gm_bytes_written, 153376 * (28 if dtype == "float32" else 38)
        assert readme.says(cells, [moved, moved / memory * 1e6, report.vector_instructions,
                                   report.vector_instructions / vector * 1e6, built_ins, built_ins / memory * 1e6,
                                   built_ins / moved])


def test_readme_states_what_the_operators_keep_in_ub(readme):
    table = readme.table("operator")
    for name, chip, dtype, *cells in table:
        size, widened = (4, 0) if dtype == "float32" else (2, 4)
        bytes_of_logit = {"PanguTopkKl": 4 * size + widened + 4, "PanguTopkKlStats": 2 * size + widened + 4,
                          "PanguTopkKlFromStats": 4 * size + widened}[name]
        in_ub = reports("ascend" + chip, dtype, 1, 153376, 10)[name].ub_bytes_used
        tile = (in_ub - 12704) // bytes_of_logit
        assert bytes_of_logit * tile + 12704 == in_ub
        assert readme.says(cells, [bytes_of_logit, tile, -(-153376 // tile), in_ub])
    assert {row[0] for row in table} == {"PanguTopkKl", "PanguTopkKlStats", "PanguTopkKlFromStats"}


def test_row_without_weights_is_not_read_for_its_gradient():
    case = random_case(8, "float16", 4, 5000, 8)
    case["ce_weights"][:] = case["kl_weights"][:] = 0
    outputs, report = topk_kl(case, "ascend910b", "float16")
    np.testing.assert_array_equal(outputs[4], 0)
    assert report.gm_bytes_read < 1.05 * case["logits"].nbytes


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_core_counts_and_ub_sizes_give_the_same(dtype):
    case = random_case(9, dtype, 13, 5003, 17)
    expected, _ = topk_kl(case, "ascend910b", dtype, 2.0)
    for soc, platform in (("ascend910b", {"cores": 2}), ("ascend910b", {"cores": 6, "ub_bytes": 40000}),
                          ("ascend310b", {}), ("ascend910b", {"cores": 48, "ub_bytes": 100000}),
                          ("ascend310b", {"ub_bytes": 31136})):
        outputs, report = topk_kl(case, soc, dtype, 2.0, **platform)
        np.testing.assert_array_equal(outputs[3], expected[3])
        for ours, theirs in zip([*outputs[:3]], expected, strict=False):
            np.testing.assert_allclose(ours, theirs, rtol=LOSS_ERROR, atol=LOSS_ERROR)  # sums in another order
        assert gradient_error(case, outputs[4], to_float64(expected[4])) <= 2 * GRADIENT_ERROR[dtype]
        if "ub_bytes" in platform:
            assert report.ub_bytes_used <= platform["ub_bytes"] - 8192


def test_every_missing_sync_is_caught(uncaught_syncs):
    """Each sync statement, switched off alone, breaks a rule of the model in at least one launch."""

    def launches():
        for dtype in ("float16", "float32"):
            # Three blocks of rows on two cores, tiles with and without ids, the last not full, rows without weights.
            case = random_case(3, dtype, 20, 3001, 3)
            case["ce_weights"][::2] = case["kl_weights"][::2] = 1
            case["ce_weights"][3::4] = case["kl_weights"][3::4] = 0
            options = {"ub_bytes": SMALL_UB, "cores": 2, "removable": True}
            for tail in ("renormalised_both", "bucket", "truncated"):
                for temperature in (2.0, 1.0):
                    for with_gradient in (True, False):
                        yield "pangu_topk_kl", dtype, functools.partial(
                            topk_kl, case, "ascend910b", dtype, temperature, tail, with_gradient, **options)
            whole = case["logits"].shape[1]
            yield "pangu_topk_kl_stats", dtype, functools.partial(
                topk_kl_stats, case, "ascend910b", dtype, 0, whole, **options)
            stats = topk_kl_stats(case, "ascend910b", dtype, 0, whole)
            for with_gradient in (True, False):
                yield "pangu_topk_kl_from_stats", dtype, functools.partial(
                    topk_kl_from_stats, case, stats, "ascend910b", dtype, 0, whole, 1.0, "bucket", with_gradient,
                    **options)

    uncaught, num_statements = uncaught_syncs(
        (kernel(name, "ascend910b", dtype, removable=True), launch) for name, dtype, launch in launches())
    assert num_statements > 50
    assert not uncaught


def described(shape=(3, 100, 4), dtype="float16", with_gradient=True, **changes):
    """Shapes and types of PanguTopkKl's inputs and outputs, some changed."""
    num_rows, vocab_size, num_top = shape
    row, top = ((num_rows,), "float32"), ((num_rows, num_top), "float32")
    inputs = {"logits": ((num_rows, vocab_size), dtype), "labels": ((num_rows,), "int32"),
              "teacher_ids": ((num_rows, num_top), "int32"), "teacher_logprobs": top, "ce_weights": row,
              "kl_weights": row}
    outputs = {"ce": row, "kl": row, "teacher_mass": row, "agreement": row,
               "dlogits": ((num_rows, vocab_size) if with_gradient else (1,), dtype)}
    return ([changes.get(name, value) for name, value in inputs.items()],
            [changes.get(name, value) for name, value in outputs.items()])


@pytest.mark.parametrize("soc", SOCS)
@pytest.mark.parametrize("changes, attrs, message", [
    ({"shape": (3, 100, 65)}, (1.0, 0, True), "teacher_ids has K = 65"),
    ({"shape": (3, 100, 0)}, (1.0, 0, True), "teacher_ids has K = 0"),
    ({"shape": (3, 0, 4)}, (1.0, 0, True), "logits has 0 columns"),
    ({"shape": (0, 100, 4)}, (1.0, 0, True), "logits has 0 rows"),
    ({"shape": (3, 3, 4)}, (1.0, 0, True), "teacher_ids has K = 4 columns, expected at most the vocabulary, 3"),
    ({"logits": ((3, 2, 50), "float16")}, (1.0, 0, True), r"logits has shape \[3, 2, 50\]"),
    ({"labels": ((4,), "int32")}, (1.0, 0, True), r"labels has shape \[4\], expected \[3\]"),
    ({"labels": ((3,), "int64")}, (1.0, 0, True), "labels is int64, expected int32"),
    ({"teacher_ids": ((2, 4), "int32")}, (1.0, 0, True), r"teacher_ids has shape \[2, 4\], expected \[3, 4\]"),
    ({"teacher_logprobs": ((3, 4), "float16")}, (1.0, 0, True), "teacher_logprobs is float16, expected float32"),
    ({"kl_weights": ((3, 1), "float32")}, (1.0, 0, True), r"kl_weights has shape \[3, 1\]"),
    ({"dlogits": ((3, 100), "float32")}, (1.0, 0, True), "dlogits is float32, expected float16"),
    ({"dlogits": ((3, 100), "float16")}, (1.0, 0, False), r"dlogits has shape \[3, 100\], expected \[1\]"),
    ({"dtype": "int32"}, (1.0, 0, True), "logits is int32, expected float16, bfloat16 or float32"),
    ({}, (0.0, 0, True), "temperature is 0, expected a positive number"),
    ({}, (-1.0, 0, True), "temperature is -1"),
    ({}, (float("nan"), 0, True), "temperature is nan"),
    ({}, (1.0, 4, True), "tail is 4, expected 0 bucket"),
    ({}, (1.0, -1, True), "tail is -1"),
])
def test_tiling_names_what_does_not_fit(soc, changes, attrs, message):
    with pytest.raises(TilingError, match="PanguTopkKl: " + message):
        host_side("pangu_topk_kl").tiling(soc, *described(with_gradient=attrs[2], **changes), attrs)


def test_tiling_of_a_rank_names_what_does_not_fit():
    inputs, outputs = described((3, 100, 4))
    row = ((3,), "float32")
    stats = [row, row, ((3,), "int32"), ((3, 4), "float32"), row]
    for offset, message in ((-1, "offset is -1"), (2**31 - 50, "offset is")):
        with pytest.raises(TilingError, match="PanguTopkKlStats: " + message):
            host_side("pangu_topk_kl_stats").tiling("ascend910b", inputs[:3], stats, [offset])
    tile = host_side("pangu_topk_kl_from_stats").tiling
    tile("ascend910b", inputs + stats, outputs, [1.0, 0, True, 50, 150])
    with pytest.raises(TilingError, match="vocab_size is 149, expected at least offset . columns, 150"):
        tile("ascend910b", inputs + stats, outputs, [1.0, 0, True, 50, 149])
    with pytest.raises(TilingError, match="rest_argmax is float32, expected int32"):
        tile("ascend910b", inputs + [row] * 3 + stats[3:], outputs, [1.0, 0, True, 50, 150])
    with pytest.raises(TilingError, match="the chip has 20000 bytes of UB"):
        tile("ascend910b", inputs + stats, outputs, [1.0, 0, True, 50, 150], ub_bytes=20000)


def test_output_shapes_and_types_are_inferred():
    shapes = [(3, 100), (3,), (3, 4), (3, 4), (3,), (3,)]
    types = ["bfloat16", "int32", "int32", *["float32"] * 3]
    whole = host_side("pangu_topk_kl")
    assert whole.infer_shape(shapes, [1.0, 0, True]) == [(3,)] * 4 + [(3, 100)]
    assert whole.infer_shape(shapes, [1.0, 0, False]) == [(3,)] * 4 + [(1,)]
    assert whole.infer_dtype(types, [1.0, 0, True]) == ["float32"] * 4 + ["bfloat16"]
    stats = host_side("pangu_topk_kl_stats")
    assert stats.infer_shape(shapes[:3], [0]) == [(3,), (3,), (3,), (3, 4), (3,)]
    assert stats.infer_dtype(types[:3], [0]) == ["float32", "float32", "int32", "float32", "float32"]
    from_stats = host_side("pangu_topk_kl_from_stats")
    shapes += [(3,), (3,), (3,), (3, 4), (3,)]
    types += ["float32", "float32", "int32", "float32", "float32"]
    assert from_stats.infer_shape(shapes, [1.0, 0, True, 0, 100]) == [(3,)] * 4 + [(3, 100)]
    assert from_stats.infer_dtype(types, [1.0, 0, True, 0, 100]) == ["float32"] * 4 + ["bfloat16"]


@pytest.mark.parametrize("name", ["pangu_topk_kl", "pangu_topk_kl_stats", "pangu_topk_kl_from_stats"])
def test_both_chips_take_all_three_types(name):
    definition = host_side(name).definition()
    assert definition["kernel"] == name
    assert set(definition["socs"]) == set(SOCS)
    for soc in SOCS:
        assert definition["socs"][soc]["inputs"]["logits"] == ["float16", "bfloat16", "float32"]
