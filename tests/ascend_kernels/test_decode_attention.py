"""The decode attention kernel, run on the host, against NumPy in double precision; traffic, tiling, sync and errors."""

import functools
import importlib.util
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from ascend_kernels.host.harness import compile_kernel
from ascend_kernels.host.roofline import PEAKS
from ascend_kernels.host.tiling import PLATFORMS, TilingError, compile_op

# B sequences, N query heads, M key/value heads, S positions of the cache, H head size.
OP = Path(importlib.util.find_spec("ascend_kernels").submodule_search_locations[0]) / "decode_attention"
SOCS = ("ascend310b", "ascend910b")
# Bytes of UB for one key/value head: 2 query heads of 64 in blocks of 64 positions; 3 of 128 in blocks of 128.
SMALL_UB = 8192 + 3072, 8192 + 6144
Plan = namedtuple("Plan", "num_sequences num_kv_heads num_positions head_size group heads block num_workers")


@functools.cache
def host_side():
    return compile_op(OP / "op_host/pangu_decode_attention.cpp")


@functools.cache
def kernel(soc, removable=False):
    return compile_kernel(OP / "op_kernel/pangu_decode_attention.cpp", soc, {"Q": "float16"},
                          OP / "op_host/pangu_decode_attention_tiling.h", removable=removable)


def decode(case, soc, scale=None, removed_sync=None, removable=False, **platform):
    """One step: the output, the plan that the tiling made and the report. The case's caches are updated in place."""
    inputs = [case[name] for name in ("q", "k", "v", "k_cache", "v_cache", "positions")]
    outputs = [np.zeros_like(case["q"]), case["k_cache"], case["v_cache"]]
    described = [[(array.shape, str(array.dtype)) for array in arrays] for arrays in (inputs, outputs)]
    scale = case["q"].shape[2] ** -0.5 if scale is None else scale
    tiling = host_side().tiling(soc, *described, [scale], **platform)
    report = kernel(soc, removable).launch(
        tiling.num_blocks, inputs, outputs, tiling.data, tiling_key=tiling.key, workspace_bytes=tiling.workspace_bytes,
        removed_sync=removed_sync)
    return outputs[0], Plan(*np.frombuffer(tiling.data, np.int32, len(Plan._fields)).tolist()), report


def random_case(seed, num_kv_heads, group, num_positions, head_size, positions):
    """Rows of normal numbers; NaN in the cache after each sequence's position, where nothing may look."""
    random = np.random.default_rng(seed)

    def rows(*shape):
        return random.normal(size=shape).astype(np.float16)

    positions = np.array(positions, np.int32)
    new, old = (len(positions), num_kv_heads, head_size), (len(positions), num_kv_heads, num_positions, head_size)
    case = {"q": rows(len(positions), num_kv_heads * group, head_size), "k": rows(*new), "v": rows(*new),
            "k_cache": rows(*old), "v_cache": rows(*old), "positions": positions}
    for name in ("k_cache", "v_cache"):
        for sequence, position in enumerate(positions):
            case[name][sequence, :, max(position, 0):] = np.nan
    return case


def copy(case):
    return {name: array.copy() for name, array in case.items()}


def reference(case, scale=None):
    """The caches after the step, the output in double precision and the same with the values' magnitudes."""
    q, k_cache, v_cache = case["q"].astype(np.float64), case["k_cache"].copy(), case["v_cache"].copy()
    scale = q.shape[2] ** -0.5 if scale is None else scale
    group = q.shape[1] // case["k"].shape[1]
    out, magnitude = np.zeros_like(q), np.zeros_like(q)
    for sequence, position in enumerate(case["positions"]):
        for head in range(q.shape[1]):
            cached = sequence, head // group
            k_cache[cached][position], v_cache[cached][position] = case["k"][cached], case["v"][cached]
            keys, values = (cache[cached][:position + 1].astype(np.float64) for cache in (k_cache, v_cache))
            scores = keys @ q[sequence, head] * scale
            weights = np.exp(scores - scores.max())
            out[sequence, head] = weights @ values / weights.sum()
            magnitude[sequence, head] = weights @ np.abs(values) / weights.sum()
    return k_cache, v_cache, out, magnitude


def check(case, out, expected):
    """Asserts that the caches are right to the bit and the output to the rounding; returns error / allowed."""
    for name, theirs in zip(("k_cache", "v_cache"), expected, strict=False):
        np.testing.assert_array_equal(case[name].view(np.uint16), theirs.view(np.uint16))
    # Half a unit in the last of float16's 11 bits for the probabilities and one for the result; scores and sums are
    # float32, whose error is a few 1e-6 of the magnitude for scores around 10.
    allowed = 2.0**-11 * (np.abs(expected[2]) + expected[3]) + 1e-5 * expected[3] + 2.0**-24
    found = np.max(np.abs(out.astype(np.float64) - expected[2]) / allowed)
    assert found <= 1, found
    return found


# M, N / M, S, H and a position for each sequence: both ends of the cache and of blocks of 64; lengths that differ.
SHAPES = ((1, 2, 400, 64, (0, 63, 64, 399)), (5, 3, 260, 128, (127, 128, 259)), (2, 16, 130, 64, (129, 1)),
          (6, 2, 1100, 128, (1023,)), (1, 1, 1, 64, (0, 0)), (3, 1, 65, 128, (64, 62, 63)), (2, 9, 77, 64, (75, 76)))


@pytest.mark.parametrize("soc", SOCS)
@pytest.mark.parametrize("ub_bytes", [None, SMALL_UB[1]])
def test_attention_matches_double_precision(soc, ub_bytes):
    worst, blocks = 0, set()
    for seed, shape in enumerate(SHAPES * 2):
        case = random_case(seed, *shape)
        expected = reference(case)
        out, plan, _ = decode(case, soc, **({"ub_bytes": ub_bytes} if ub_bytes and shape[1] <= 3 else {}))
        worst = max(worst, check(case, out, expected))
        blocks.add(-(-plan.num_positions // plan.block))
    assert ub_bytes is None or max(blocks) >= 3
    print(f"{soc} {ub_bytes} bytes of UB: {worst:.2f} of the allowed error, up to {max(blocks)} blocks")


@pytest.mark.parametrize("soc", SOCS)
def test_many_sequences_share_the_cores(soc):
    random = np.random.default_rng(1)
    case = random_case(20, 6, 2, 130, 64, random.integers(0, 130, 47))
    expected = reference(case)
    out, plan, _ = decode(case, soc)
    assert plan.heads > 1 and plan.num_workers < 47 * 6
    check(case, out, expected)


@pytest.mark.parametrize("soc", SOCS)
def test_blocks_of_several_heads_hold_thousands_of_positions(soc):
    for shape in ((6, 2, 4300, 128, (4299,)), (4, 4, 4200, 64, (4199,))):
        case = random_case(21, *shape)
        expected = reference(case)
        out, plan, report = decode(case, soc, **({"cores": 2} if soc == "ascend910b" else {}))
        check(case, out, expected)
        assert plan.heads > 1 and 1024 <= plan.block < shape[2]
        assert report.ub_bytes_used == ub_budget(plan)[-1]


@pytest.mark.parametrize("soc", SOCS)
def test_equal_scores_average_the_values(soc):
    case = random_case(2, 2, 2, 300, 64, [299, 149])
    case["q"][...] = np.abs(case["q"])
    for name in ("k", "k_cache"):
        case[name][...] = np.where(np.isnan(case[name]), np.nan, -80)  # scores of minus hundreds
    expected = reference(case)
    for sequence, length in enumerate((300, 150)):
        mean = expected[1][sequence, :, :length].astype(np.float64).mean(1).repeat(2, axis=0)
        np.testing.assert_allclose(expected[2][sequence], mean, rtol=1e-12, atol=1e-12)
    out, _, _ = decode(case, soc, ub_bytes=SMALL_UB[0])
    check(case, out, expected)


@pytest.mark.parametrize("soc", SOCS)
def test_key_with_a_score_of_minus_infinity_gets_no_weight(soc):
    case = random_case(3, 2, 2, 300, 64, [299])
    case["q"][..., 7] = np.abs(case["q"][..., 7]) + np.float16(0.1)
    case["k_cache"][0, 0, :70, 7] = -np.inf  # all of the first block
    case["k_cache"][0, 1, 64::2, 7] = -np.inf
    expected = reference(case)
    assert np.isfinite(expected[2]).all()
    out, _, _ = decode(case, soc, ub_bytes=SMALL_UB[0])
    check(case, out, expected)


@pytest.mark.parametrize("soc", SOCS)
def test_scores_of_millions_stay_exact(soc):
    """Whole numbers whose sums of products float32 holds, beyond float16: few scores take all the weight."""
    case = random_case(4, 2, 2, 300, 64, [299, 170])
    random = np.random.default_rng(4)
    for name in ("q", "k", "k_cache"):
        whole = random.integers(-200, 201, case[name].shape)
        case[name][...] = np.where(np.isnan(case[name]), np.nan, whole)
    case["k_cache"][:, :, 100] = case["k_cache"][:, :, 40]  # a tie over two blocks
    expected = reference(case, 0.01)
    out, _, _ = decode(case, soc, 0.01, ub_bytes=SMALL_UB[0])
    check(case, out, expected)
    case["q"][...] = case["k_cache"][:, :, 40].repeat(2, axis=1)  # and as the maximum
    expected = reference(case, 1.0)
    assert np.abs(expected[2] - expected[1][:, :, [40, 100]].mean(2).repeat(2, axis=1)).max() < 1e-3
    out, _, _ = decode(case, soc, 1.0, ub_bytes=SMALL_UB[0])
    check(case, out, expected)


def test_many_small_probabilities_keep_their_share():
    """One key is e^17.4 times as likely as each of 32767 others, which float16 alone would round to nothing."""
    case = random_case(5, 1, 1, 32768, 64, [32767])
    case["q"][...] = 1
    case["k_cache"][...] = 0
    case["k"][...] = 0
    case["k_cache"][0, 0, 5] = 17.4 / 8
    case["v_cache"][...], case["v"][...] = 1000, 1000
    case["v_cache"][0, 0, 5] = 0
    expected = reference(case)
    np.testing.assert_allclose(expected[2], 1000 / (np.exp(np.float16(17.4 / 8) * 8.0) / 32767 + 1), rtol=1e-9)
    out, _, _ = decode(case, "ascend310b")
    np.testing.assert_allclose(out, expected[2], rtol=2.0**-10)


@pytest.mark.parametrize("soc", SOCS)
def test_greedy_decoding_from_an_empty_cache(soc):
    """Two sequences of a one-layer model choose the tokens that they choose without a cache, in double precision."""
    num_steps, late, width, vocab_size, group, num_kv_heads, head_size = 150, 37, 48, 60, 2, 2, 64
    random = np.random.default_rng(6)
    embeddings, places = random.normal(size=(vocab_size, width)), random.normal(size=(num_steps, width))
    to_q, to_k, to_v, back = (random.normal(0, width**-0.5, shape) for shape in (
        (width, num_kv_heads * group, head_size), (width, num_kv_heads, head_size), (width, num_kv_heads, head_size),
        (num_kv_heads * group, head_size, width)))

    def project(token, place, weights):
        return np.tensordot(embeddings[token] + places[place], weights, 1).astype(np.float16)

    def next_token(token, place, out):
        return int(np.argmax(embeddings @ (np.tensordot(out.astype(np.float64), back, 2) + 0.3 * places[place])))

    def without_cache(token, steps):
        tokens = [token]
        for place in range(steps):
            q, scores = project(tokens[-1], place, to_q).astype(np.float64), []
            keys, values = (np.stack([project(token, i, weights) for i, token in enumerate(tokens)]).astype(np.float64)
                            .repeat(group, axis=1) for weights in (to_k, to_v))
            scores = np.exp(np.einsum("nh,tnh->nt", q, keys) * head_size**-0.5)
            out = np.einsum("nt,tnh->nh", scores / scores.sum(1, keepdims=True), values)
            tokens.append(next_token(tokens[-1], place, out))
        return tokens

    cache = np.full((2, num_kv_heads, num_steps, head_size), np.nan, np.float16)
    k_cache, v_cache, tokens = cache, cache.copy(), [[3], [14]]
    for step in range(num_steps):
        positions = np.array([step, step - late], np.int32)  # the second one comes later
        last = [(known[-1], max(place, 0)) for known, place in zip(tokens, positions, strict=True)]
        q, k, v = (np.stack([project(*of, weights) for of in last]) for weights in (to_q, to_k, to_v))
        case = {"q": q, "k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache, "positions": positions}
        out, plan, _ = decode(case, soc, ub_bytes=SMALL_UB[0])
        for sequence, place in enumerate(positions):
            if place >= 0:
                tokens[sequence].append(next_token(tokens[sequence][-1], place, out[sequence]))
    assert plan.block < num_steps
    assert tokens == [without_cache(3, num_steps), without_cache(14, num_steps - late)]
    assert len(set(tokens[0])) > 10  # not one token over and over
    assert not np.isnan(k_cache[0]).any() and np.isnan(k_cache[1, :, num_steps - late:]).all()


@pytest.mark.parametrize("soc", SOCS)
def test_position_outside_the_cache_gives_nan_and_leaves_the_cache(soc):
    limits = np.iinfo(np.int32)
    positions = [40, 80, -1, limits.max, limits.min, 79]
    case = random_case(7, 3, 2, 80, 64, positions)
    before, inside = copy(case), [0, 5]
    out, _, _ = decode(case, soc)
    outside = [sequence for sequence in range(len(positions)) if sequence not in inside]
    assert np.isnan(out[outside]).all()
    for name in ("k_cache", "v_cache"):
        np.testing.assert_array_equal(case[name][outside].view(np.uint16), before[name][outside].view(np.uint16))
    part = {name: array[inside] for name, array in before.items()}
    check({name: array[inside] for name, array in case.items()}, out[inside], reference(part))


def test_other_core_counts_and_ub_sizes_give_the_same():
    case = random_case(8, 6, 2, 700, 64, [699, 320])
    expected, seen = reference(case), set()
    for soc, platform in (("ascend310b", {}), ("ascend310b", {"ub_bytes": SMALL_UB[0]}),
                          ("ascend310b", {"ub_bytes": 40000}), ("ascend910b", {}), ("ascend910b", {"cores": 2}),
                          ("ascend910b", {"cores": 6, "ub_bytes": 30000}),
                          ("ascend910b", {"cores": 48, "ub_bytes": SMALL_UB[0]})):
        ours = copy(case)
        out, plan, report = decode(ours, soc, **platform)
        check(ours, out, expected)
        seen.add((plan.heads, plan.block))
        assert report.ub_bytes_used == ub_budget(plan)[-1]
        if "ub_bytes" in platform:
            assert report.ub_bytes_used <= platform["ub_bytes"] - 8192
    assert len(seen) >= 4


def ub_budget(plan):
    """Bytes of UB, row by row of README.md's table, and their sum."""
    rows = plan.heads * plan.group
    padded, widest = -(-rows // 8) * 8, max(plan.block, plan.head_size)
    parts = [4 * rows * widest, 2 * rows * widest, 4 * plan.heads * plan.head_size, 4 * rows * plan.head_size,
             256 * rows, 96 * padded, 16 * padded]
    return [*parts, sum(parts)]


def predicted_traffic(plan, positions):
    """README.md's formula: bytes moved, those in the workspace, and those that read the cache and carry new rows."""
    n = np.array(positions) + 1
    n_heads, blocks = plan.num_kv_heads * plan.group, -(-n // plan.block)
    cache = 4 * plan.num_kv_heads * n * plan.head_size
    rows = 8 * plan.num_kv_heads * plan.head_size
    items = -(-plan.num_kv_heads // plan.heads)
    workspace = 12 * n_heads * n + 8 * n_heads * plan.head_size * blocks
    rest = 2 * n_heads * plan.head_size * (blocks + 1) + 4 * items
    return [int(parts.sum()) for parts in (cache + rows + workspace + rest, workspace, cache + rows)]


def unfused_traffic(num_positions, n_heads=12, num_kv_heads=6, head_size=128):
    """README.md's formula for the composition of built-ins, which reads the whole of a static cache."""
    return (4 * num_kv_heads * num_positions * head_size + 8 * num_kv_heads * head_size + 4 * n_heads * head_size
            + 32 * n_heads * num_positions + 2 * num_positions)


def moved(report):
    return report.gm_bytes_read + report.gm_bytes_written


@pytest.mark.parametrize("soc", SOCS)
def test_traffic_is_what_the_formula_says_and_each_key_and_value_is_read_once(soc):
    for shape, platform in (((6, 2, 2000, 128, [1500]), {}), ((6, 2, 2000, 128, [1999]), {}),
                            ((5, 3, 700, 64, [699, 3]), {}), ((4, 16, 300, 64, [299]), {}),
                            ((1, 2, 700, 64, [500, 699]), {"ub_bytes": SMALL_UB[0]})):
        _, plan, report = decode(random_case(9, *shape), soc, **platform)
        expected, workspace, least = predicted_traffic(plan, shape[4])
        assert (moved(report), report.workspace_bytes) == (expected, workspace)
        if shape[0] == 6:
            assert moved(report) <= 1.1 * least
    # The size of the cache does not count, only what is in it.
    short, long = (decode(random_case(9, 6, 2, size, 128, [1023]), soc)[2] for size in (1024, 4000))
    assert moved(short) == moved(long)


def test_readme_states_what_the_harness_measures(readme):
    memory, _, vector = PEAKS["ascend310b"]
    reports = {}
    for cached, size, *cells in readme.table("cached tokens"):
        cached, size = int(readme.number(cached)), int(readme.number(size))
        if cached not in reports:
            case = random_case(10, 6, 2, cached, 128, [cached - 1])
            reports[cached] = decode(case, "ascend310b")[2]
        report, unfused = reports[cached], unfused_traffic(size)
        assert readme.says(cells, [moved(report), report.workspace_bytes, moved(report) / memory * 1e6,
                                   report.vector_instructions, report.vector_instructions / vector * 1e6,
                                   report.cube_flops / 1e6, unfused, unfused / memory * 1e6, unfused / moved(report)])
    assert set(reports) == {1024, 8192}
    _, plan, report = decode(random_case(10, 6, 2, 4096, 128, [5]), "ascend310b")
    assert readme.says([row[-1] for row in readme.table("in UB")], ub_budget(plan))
    assert ub_budget(plan)[-1] == report.ub_bytes_used


def test_readme_states_what_the_tiling_decides(readme):
    rows = readme.table("chip")
    for chip, *cells in rows:
        inputs, outputs = described(*(int(readme.number(cell)) for cell in cells[:5]))
        tiling = host_side().tiling("ascend" + chip, inputs, outputs, [1.0])
        plan = Plan(*np.frombuffer(tiling.data, np.int32, len(Plan._fields)).tolist())
        own_workspace = tiling.workspace_bytes - PLATFORMS["ascend" + chip].library_workspace
        assert readme.says(cells[5:], [plan.heads, plan.block, ub_budget(plan)[-1], plan.num_workers, own_workspace])
    assert {row[0] for row in rows} == {"310b", "910b"}


def test_every_missing_sync_is_caught(uncaught_syncs):
    """Each sync statement, switched off alone, breaks a rule of the model in at least one launch."""

    def launches():
        for soc, shape, ub_bytes in (("ascend910b", (3, 2, 200, 64, [150, -1, 199]), SMALL_UB[0]),
                                     ("ascend910b", (5, 3, 300, 128, [63, 299]), SMALL_UB[1]),
                                     ("ascend310b", (3, 2, 200, 64, [150, -1, 199]), SMALL_UB[0])):
            launch = functools.partial(decode, random_case(11, *shape), soc, removable=True, ub_bytes=ub_bytes,
                                       **({"cores": 2} if soc == "ascend910b" else {}))
            assert launch()[1].block < shape[2]
            yield kernel(soc, removable=True), launch

    uncaught, num_statements = uncaught_syncs(launches())
    assert num_statements > 15
    assert not uncaught


def described(b=2, n=4, m=2, s=32, h=64, **changes):
    """Shapes and types of the inputs and outputs, some changed."""
    new, cache = ((b, m, h), "float16"), ((b, m, s, h), "float16")
    inputs = {"q": ((b, n, h), "float16"), "k": new, "v": new, "k_cache": cache, "v_cache": cache,
              "positions": ((b,), "int32")}
    outputs = {"out": ((b, n, h), "float16"), "k_cache_out": cache, "v_cache_out": cache}
    return ([changes.get(name, value) for name, value in inputs.items()],
            [changes.get(name, value) for name, value in outputs.items()])


@pytest.mark.parametrize("soc", SOCS)
@pytest.mark.parametrize("changes, scale, message", [
    ({"q": ((2, 4, 64), "float32")}, 1.0, "q is float32, expected float16"),
    ({"q": ((2, 4, 64), "bfloat16")}, 1.0, "q is bfloat16, expected float16"),
    ({"k": ((2, 2, 64), "bfloat16")}, 1.0, "k is bfloat16, expected float16"),
    ({"v_cache": ((2, 2, 32, 64), "float32")}, 1.0, "v_cache is float32, expected float16"),
    ({"positions": ((2,), "int64")}, 1.0, "positions is int64, expected int32"),
    ({"out": ((2, 4, 64), "float32")}, 1.0, "out is float32, expected float16"),
    ({"q": ((2, 256), "float16")}, 1.0, r"q has shape \[2, 256\], expected \[sequences, heads, head size\]"),
    ({"k": ((2, 128), "float16")}, 1.0, r"k has shape \[2, 128\], expected \[sequences, key/value heads, head size\]"),
    ({"k_cache": ((2, 2, 64), "float16")}, 1.0,
     r"k_cache has shape \[2, 2, 64\], expected \[sequences, key/value heads, positions, head size\]"),
    ({"v": ((2, 3, 64), "float16")}, 1.0, r"v has shape \[2, 3, 64\], expected \[2, 2, 64\]"),
    ({"k": ((3, 2, 64), "float16")}, 1.0, r"k has shape \[3, 2, 64\], expected \[2, 2, 64\]"),
    ({"k_cache": ((2, 2, 32, 128), "float16")}, 1.0, r"k_cache has shape \[2, 2, 32, 128\], expected \[2, 2, 32, 64\]"),
    ({"v_cache": ((2, 2, 31, 64), "float16")}, 1.0, r"v_cache has shape \[2, 2, 31, 64\], expected \[2, 2, 32, 64\]"),
    ({"positions": ((2, 1), "int32")}, 1.0, r"positions has shape \[2, 1\], expected \[2\]"),
    ({"out": ((2, 2, 64), "float16")}, 1.0, r"out has shape \[2, 2, 64\], expected \[2, 4, 64\]"),
    ({"v_cache_out": ((2, 2, 16, 64), "float16")}, 1.0, r"v_cache has shape \[2, 2, 16, 64\], expected"),
    ({"b": 0}, 1.0, "q has 0 sequences, expected at least 1"),
    ({"s": 0}, 1.0, "k_cache has 0 positions, expected 1 to"),
    ({"s": 1 << 25}, 1.0, "k_cache has 33554432 positions, expected 1 to 33554431"),
    ({"h": 32}, 1.0, "q has head size 32, expected 64 or 128"),
    ({"n": 5}, 1.0, "q has 5 heads, expected 1 to 16 for each of the 2 key/value heads"),
    ({"n": 34}, 1.0, "q has 34 heads, expected 1 to 16 for each of the 2 key/value heads"),
    ({"n": 0}, 1.0, "q has 0 heads"),
    ({"m": 0}, 1.0, "q has 4 heads, expected 1 to 16 for each of the 0 key/value heads"),
    ({"b": 1 << 24}, 1.0, r"q has shape \[16777216, 4, 64\], expected less than 2\^31 numbers"),
    ({}, 0.0, "scale is 0, expected a positive number"),
    ({}, -0.125, "scale is -0.125"),
    ({}, float("inf"), "scale is inf"),
    ({}, float("nan"), "scale is nan"),
])
def test_tiling_names_what_does_not_fit(soc, changes, scale, message):
    with pytest.raises(TilingError, match="PanguDecodeAttention: " + message):
        host_side().tiling(soc, *described(**changes), [scale])


def test_tiling_says_how_much_ub_is_needed():
    inputs, outputs = described()
    with pytest.raises(TilingError, match="the chip has 8192 bytes of UB, expected at least ") as error:
        host_side().tiling("ascend310b", inputs, outputs, [1.0], ub_bytes=8192)
    needed = int(str(error.value).split()[-1])
    host_side().tiling("ascend310b", inputs, outputs, [1.0], ub_bytes=needed)
    with pytest.raises(TilingError, match="expected at least"):
        host_side().tiling("ascend310b", inputs, outputs, [1.0], ub_bytes=needed - 1)


def test_output_shapes_and_types_are_inferred():
    inputs, outputs = described(3, 12, 6, 100, 128)
    shapes = [shape for shape, _ in inputs]
    assert host_side().infer_shape(shapes, [1.0]) == [shape for shape, _ in outputs]
    assert host_side().infer_dtype([dtype for _, dtype in inputs], [1.0]) == ["float16"] * 3
    with pytest.raises(TilingError, match=r"PanguDecodeAttention: q has shape \[3, 1536\]"):
        host_side().infer_shape([(3, 1536), *shapes[1:]], [1.0])


def test_definition_updates_the_caches_in_place_on_both_chips():
    definition = host_side().definition()
    names = [param["name"] for param in definition["inputs"]]
    assert names == ["q", "k", "v", "k_cache", "v_cache", "positions"]
    assert [param["name"] for param in definition["outputs"]] == ["out", "k_cache", "v_cache"]
    assert definition["kernel"] == "pangu_decode_attention"
    assert set(definition["socs"]) == set(SOCS)
    for soc in SOCS:
        assert definition["socs"][soc]["inputs"]["k_cache"] == ["float16"]
