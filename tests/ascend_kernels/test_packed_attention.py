"""The packed attention kernels, run on the host, against double precision; documents, bits, traffic, sync, errors."""

import functools
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from ascend_kernels.host.harness import compile_kernel, to_dtype, to_float64
from ascend_kernels.host.tiling import TilingError, compile_op

# T tokens, N query heads, M key/value heads, H head size.
OP = Path(importlib.util.find_spec("ascend_kernels").submodule_search_locations[0]) / "packed_attention"
CHIPS = tuple((soc, dtype) for soc in ("ascend910b", "ascend310b") for dtype in ("float16", "bfloat16"))
UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8}  # half a unit in the last place, relative
SMALL_UB = 100_000  # bytes: narrower tiles and shorter strips


@functools.cache
def host_side(name):
    return compile_op(OP / f"op_host/{name}.cpp")


@functools.cache
def kernel(name, soc, dtype, removable=False):
    header = OP / "op_host/pangu_packed_attention_tiling.h"
    return compile_kernel(OP / f"op_kernel/{name}.cpp", soc, {"Q": dtype}, header, removable=removable)


def run(name, soc, dtype, inputs, outputs, scale, removable=False, removed_sync=None, **platform):
    op = host_side(name)

    def described(arrays):
        return [(array.shape, dtype if array.itemsize == 2 else str(array.dtype)) for array in arrays]

    tiling = op.tiling(soc, described(inputs), described(outputs), [scale], **platform)
    return kernel(name, soc, dtype, removable).launch(
        tiling.num_blocks, inputs, outputs, tiling.data, tiling_key=tiling.key, workspace_bytes=tiling.workspace_bytes,
        removed_sync=removed_sync)


def attention(case, soc, **options):
    """PanguPackedAttention: out, lse and the report."""
    q = case["q"]
    out, lse = np.zeros_like(q), np.zeros((q.shape[1], q.shape[0]), np.float32)
    inputs = [q, case["k"], case["v"], case["cu_seqlens"]]
    return out, lse, run("pangu_packed_attention", soc, case["dtype"], inputs, [out, lse], case["scale"], **options)


def attention_grad(case, soc, out, lse, **options):
    """PanguPackedAttentionGrad: [dq, dk, dv] and the report."""
    inputs = [case["q"], case["k"], case["v"], to_dtype(out, case["dtype"]), case["dout"], lse.astype(np.float32),
              case["cu_seqlens"]]
    outputs = [np.zeros_like(case[name]) for name in ("q", "k", "v")]
    return outputs, run("pangu_packed_attention_grad", soc, case["dtype"], inputs, outputs, case["scale"], **options)


def random_case(seed, dtype, cu_seqlens, num_heads, num_kv_heads, head_size, spread=1.0):
    random = np.random.default_rng(seed)
    num_tokens = cu_seqlens[-1]
    shapes = {"q": num_heads, "k": num_kv_heads, "v": num_kv_heads, "dout": num_heads}
    case = {name: to_dtype(spread * random.normal(0, 1, (num_tokens, heads, head_size)), dtype)
            for name, heads in shapes.items()}
    return case | {"cu_seqlens": np.array(cu_seqlens, np.int64), "dtype": dtype, "scale": head_size**-0.5}


def documents(case):
    ends = case["cu_seqlens"]
    return [slice(begin, end) for begin, end in zip(ends[:-1], ends[1:], strict=True) if end > begin]


def reference(case):
    """By the definition, in double precision: out and the three gradients; lse; and how far roundings to the dtype may
    move each of the four: of the probabilities, of the scores' gradients, of out in delta, of the result."""
    q, k, v, dout = (to_float64(case[name]) for name in ("q", "k", "v", "dout"))
    scale, unit = case["scale"], UNIT[case["dtype"]]
    group = q.shape[1] // k.shape[1]
    found = {"out": np.zeros_like(q), "dq": np.zeros_like(q), "dk": np.zeros_like(k), "dv": np.zeros_like(v)}
    bounds = {name: np.zeros_like(values) for name, values in found.items()}
    lse = np.zeros((q.shape[1], q.shape[0]))
    for document in documents(case):
        for head in range(q.shape[1]):
            kv = head // group
            ql, kl, vl, dl = q[document, head], k[document, kv], v[document, kv], dout[document, head]
            scores = np.where(np.tri(len(ql), dtype=bool), ql @ kl.T * scale, -np.inf)
            largest = scores.max(-1, keepdims=True)
            p = np.exp(scores - largest)
            total = p.sum(-1, keepdims=True)
            p, lse[head, document] = p / total, (largest + np.log(total))[:, 0]
            out = p @ vl
            dp = dl @ vl.T
            ds = p * (dp - (out * dl).sum(-1, keepdims=True))
            found["out"][document, head] = out
            found["dq"][document, head] = ds @ kl * scale
            found["dk"][document, kv] += ds.T @ ql * scale
            found["dv"][document, kv] += p.T @ dl
            ds_moves = np.abs(ds) + p * np.abs(out * dl).sum(-1, keepdims=True)
            bounds["out"][document, head] = p @ np.abs(vl)
            bounds["dq"][document, head] = ds_moves @ np.abs(kl) * scale
            bounds["dk"][document, kv] += ds_moves.T @ np.abs(ql) * scale
            bounds["dv"][document, kv] += p.T @ np.abs(dl)
    bounds = {name: unit * (bound + np.abs(found[name])) for name, bound in bounds.items()}
    return found, lse, bounds


def check(case, soc, **options):
    """Forward and backward of a case within the bounds; the errors relative to the largest value of each result."""
    found, lse, bounds = reference(case)
    out, our_lse, _ = attention(case, soc, **options)
    np.testing.assert_allclose(our_lse, lse, rtol=2e-6, atol=4e-6)  # float32 throughout
    gradients, _ = attention_grad(case, soc, found["out"], lse, **options)
    errors = {}
    for name, ours in zip(("out", "dq", "dk", "dv"), (out, *gradients), strict=True):
        error = np.abs(to_float64(ours) - found[name])
        largest = np.abs(found[name]).max()
        # 5 %: second-order terms. 1e-6: float32 sums, and results that half cannot hold as normal numbers.
        assert (error <= 1.05 * bounds[name] + 1e-6 * (1 + largest)).all(), (name, error.max(), largest)
        errors[name] = error.max() / max(largest, 1e-30)
    return errors


def random_lengths(random, num_tokens, longest):
    """Cumulative lengths of documents of 1 to `longest` tokens, padded with three of none."""
    ends = [0]
    while ends[-1] < num_tokens:
        ends.append(min(num_tokens, ends[-1] + int(random.integers(1, longest + 1))))
    return ends + [num_tokens] * 3


@pytest.mark.parametrize("soc, dtype", CHIPS)
def test_attention_and_gradients_match_double_precision(soc, dtype):
    worst = {}
    for seed, (num_tokens, longest, heads, size) in enumerate((
            (1, 1, (1, 1), 64), (7, 3, (2, 1), 128), (64, 64, (4, 2), 64), (129, 40, (3, 1), 64),
            (257, 300, (2, 2), 128), (530, 530, (2, 1), 64), (600, 9, (2, 1), 128), (1100, 700, (1, 1), 64))):
        case = random_case(seed, dtype, random_lengths(np.random.default_rng(seed), num_tokens, longest), *heads, size)
        for options in ({}, {"ub_bytes": SMALL_UB}):
            errors = check(case, soc, **options)
            if num_tokens > 1:  # one token's scores have no gradient: dq and dk are 0
                worst = {name: max(error, worst.get(name, 0)) for name, error in errors.items()}
    print(f"{soc} {dtype}: largest error over the largest value: ", {name: f"{e:.2g}" for name, e in worst.items()})


@pytest.mark.parametrize("soc, dtype", CHIPS)
def test_documents_of_one_token_return_their_value(soc, dtype):
    case = random_case(1, dtype, range(301), 4, 2, 64)
    out, lse, _ = attention(case, soc)
    np.testing.assert_array_equal(out, np.repeat(case["v"], 2, axis=1))
    check(case, soc)


def test_row_of_three_thousand_documents():
    random = np.random.default_rng(2)
    lengths = random.integers(1, 22, 3000)
    case = random_case(2, "float16", [0, *np.cumsum(lengths)], 1, 1, 64)
    assert len(case["q"]) > 32768  # a row longer than the model's
    check(case, "ascend910b")


def test_one_long_document():
    case = random_case(3, "bfloat16", [0, 4100], 1, 1, 64)
    check(case, "ascend910b")


@pytest.mark.parametrize("soc, dtype", CHIPS)
def test_equal_keys_and_huge_scores_stay_exact(soc, dtype):
    case = random_case(4, dtype, [0, 200, 333], 2, 1, 64)
    case["k"][:] = case["k"][:1]  # every score of a row alike: the mean of the values
    check(case, soc)
    case = random_case(5, dtype, [0, 200, 333], 2, 1, 64, spread=30.0)  # scores up to some thousands, one wins
    out, lse, _ = attention(case, soc)
    found, expected, bounds = reference(case)
    # A score of 4000 in float32 is known to 2.4e-4, and a probability to that part.
    allowed = 1.05 * bounds["out"] + 1e-3 * np.abs(to_float64(case["v"])).max()
    assert (np.abs(to_float64(out) - found["out"]) <= allowed).all()
    np.testing.assert_allclose(lse, expected, rtol=1e-6)


def test_no_document_sees_another():
    """Changing one document's keys, values and queries changes no bit of the others' results."""
    ends = [0, 3, 100, 131, 260, 300]
    case = random_case(6, "float16", ends, 2, 1, 64)
    out, lse, _ = attention(case, "ascend910b")
    other = random_case(7, "float16", ends, 2, 1, 64)
    changed = slice(100, 131)
    mixed = case | {name: case[name].copy() for name in ("q", "k", "v")}
    for name in ("q", "k", "v"):
        mixed[name][changed] = other[name][changed]
    out_2, lse_2, _ = attention(mixed, "ascend910b")
    kept = np.ones(300, bool)
    kept[changed] = False
    np.testing.assert_array_equal(out[kept], out_2[kept])
    np.testing.assert_array_equal(lse[:, kept], lse_2[:, kept])
    assert (out[changed] != out_2[changed]).any()


@pytest.mark.parametrize("soc, cores", [("ascend910b", (2, 6, 40)), ("ascend310b", (1,))])
def test_results_are_the_same_to_the_bit_on_any_number_of_cores(soc, cores):
    case = random_case(8, "float16", [0, 400, 410, 700], 4, 2, 64)
    found, lse, _ = reference(case)
    expected = None
    for count in (*cores, *cores):
        out, our_lse, _ = attention(case, soc, cores=count)
        gradients, _ = attention_grad(case, soc, found["out"], lse, cores=count)
        results = [out, our_lse, *gradients]
        expected = expected or results
        for ours, theirs in zip(results, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_small_probabilities_keep_their_bits():
    """Keys that no query looks at much: their dv is a sum of probabilities that half alone would round to nothing."""
    case = random_case(12, "float16", [0, 1024], 1, 1, 64)
    case["q"][:] = 1
    case["k"][:] = np.where(np.arange(1024) % 2, -0.9, 1.0)[:, None, None]  # every other score is 15.2 lower
    found, lse, bounds = reference(case)
    (_, _, dv), _ = attention_grad(case, "ascend910b", found["out"], lse)
    error, seldom = np.abs(to_float64(dv) - found["dv"])[1::2], np.abs(found["dv"])[1::2]
    assert np.median(seldom) < 1e-6
    assert (error <= 1.05 * bounds["dv"][1::2] + 2.0**-25).all()  # the last: half a unit of half's smallest


# ---- Traffic ----


def predicted_bytes(case, rows, columns):
    """README's formula: what the tiles of the forward pass move, tile by tile, for a tiling's rows and columns."""
    num_tokens, num_heads, size = case["q"].shape
    ends = case["cu_seqlens"]
    total = num_tokens * num_heads * (2 * size + 4)  # out and lse
    for first in range(0, num_tokens, rows):
        last = min(first + rows, num_tokens)
        begin = ends[np.searchsorted(ends, first, "right") - 1]
        for keys in range(begin, last, columns):
            width = min(columns, last - keys)
            starts = ends[np.searchsorted(ends, np.arange(first, last), "right") - 1]
            height = max(1, int((starts < keys + width).sum()) - max(0, keys - first))
            total += num_heads * (2 * size * (height + 2 * width) + 12 * height * width + 8 * height * size)
    return total


@pytest.mark.parametrize("soc", ["ascend910b", "ascend310b"])
@pytest.mark.parametrize("lengths", [[0, 2000], [0, 700, 701, 1400, 1990, 2000], list(range(0, 2001, 10))])
def test_forward_moves_what_its_tiling_predicts(soc, lengths):
    case = random_case(9, "float16", lengths, 2, 1, 128)
    _, _, report = attention(case, soc)
    predicted = predicted_bytes(case, 128, 512)
    moved = report.gm_bytes_read + report.gm_bytes_written
    print(f"{soc}, {len(lengths) - 1} documents: {moved / predicted:.3f} of {predicted / 1e6:.1f} MB, "
          f"{report.vector_instructions} vector instructions, {report.cube_flops / 1e9:.2f} GFLOP")
    assert 0.95 * predicted <= moved <= 1.1 * predicted


def test_sizes_in_the_readme_are_those_of_the_tiling(readme):
    """Rows, columns, strip, UB and workspace for a long row of the 1B's heads."""
    rows = readme.table("chip | pass")
    assert len(rows) == 8
    for chip, which, size, *numbers in rows:
        grad, soc = which == "backward", f"ascend{chip}"
        name = "pangu_packed_attention_grad" if grad else "pangu_packed_attention"
        shape = {"tokens": 32768, "heads": 12, "kv_heads": 6, "size": int(size)}
        tiling = host_side(name).tiling(soc, *described(**shape, grad=grad), [0.1])
        fields = np.frombuffer(tiling.data[:48], np.int32)
        case = random_case(11, "float16", [0, 600], 2, 1, int(size))
        if grad:
            found, lse, _ = reference(case)
            _, report = attention_grad(case, soc, found["out"], lse)
        else:
            _, _, report = attention(case, soc)
        ub = f"{report.ub_bytes_used / 1024:.1f} of {dict(ascend910b=184, ascend310b=248)[soc]}"
        assert numbers == [*map(str, fields[5:8]), ub, str(int(fields[10]) // 1024)]


# ---- Synchronisation ----


@pytest.mark.parametrize("name", ["pangu_packed_attention", "pangu_packed_attention_grad"])
def test_every_missing_sync_is_caught(name, uncaught_syncs):
    """Each sync statement, switched off alone, breaks a rule of the model in at least one launch."""

    def launches():
        # Many short strips and steps; few; one strip in the last tile.
        for dtype, lengths, size, ub_bytes in (
                ("float16", [0, 90, 91, 92, 95, 200, 900], 128, SMALL_UB), ("bfloat16", [0, 300, 330], 64, SMALL_UB),
                ("float16", [0, 1040], 64, None)):
            case = random_case(10, dtype, lengths, 2, 1, size)
            found, lse, _ = reference(case)
            options = {"ub_bytes": ub_bytes, "cores": 4, "removable": True}
            removable = kernel(name, "ascend910b", dtype, removable=True)
            if name == "pangu_packed_attention":
                yield removable, functools.partial(attention, case, "ascend910b", **options)
            else:
                yield removable, functools.partial(attention_grad, case, "ascend910b", found["out"], lse, **options)

    uncaught, num_statements = uncaught_syncs(launches())
    assert num_statements > 15
    assert not uncaught


# ---- The host side ----


def described(tokens=100, heads=4, kv_heads=2, size=64, dtype="float16", grad=False, **changes):
    """Shapes and types of the operator's inputs and outputs, some changed."""
    query, key = ((tokens, heads, size), dtype), ((tokens, kv_heads, size), dtype)
    lse = ((heads, tokens), "float32")
    inputs = {"q": query, "k": key, "v": key}
    inputs |= {"out": query, "dout": query, "lse": lse} if grad else {}
    inputs |= {"cu_seqlens": ((5,), "int64")}
    outputs = {"dq": query, "dk": key, "dv": key} if grad else {"out": query, "lse": lse}
    names = [*inputs, *outputs]
    assert set(changes) <= set(names)
    return [changes.get(name, value) for name, value in inputs.items()], [changes.get(n, v) for n, v in outputs.items()]


@pytest.mark.parametrize("soc", ["ascend910b", "ascend310b"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("changes, scale, message", [
    ({"dtype": "float32"}, 0.1, "q is float32, expected float16 or bfloat16"),
    ({"size": 96}, 0.1, "q has head size 96, expected 64 or 128"),
    ({"heads": 3}, 0.1, "q has 3 heads, expected a multiple of the 2 key/value heads"),
    ({"tokens": 0}, 0.1, "q has 0 tokens"),
    ({"q": ((100, 256), "float16")}, 0.1, r"q has shape \[100, 256\], expected \[tokens, heads, head size\]"),
    ({"k": ((99, 2, 64), "float16")}, 0.1, r"k has shape \[99, 2, 64\], expected \[100, 2, 64\]"),
    ({"v": ((100, 2, 64), "bfloat16")}, 0.1, "v is bfloat16, expected float16"),
    ({"cu_seqlens": ((1,), "int64")}, 0.1, r"cu_seqlens has shape \[1\], expected \[documents \+ 1\], at least 2"),
    ({"cu_seqlens": ((5,), "int32")}, 0.1, "cu_seqlens is int32, expected int64"),
    ({"lse": ((100, 4), "float32")}, 0.1, r"lse has shape \[100, 4\], expected \[4, 100\]"),
    ({}, 0.0, "scale is 0, expected a positive number"),
    ({}, float("nan"), "scale is nan"),
])
def test_tiling_names_what_does_not_fit(soc, grad, changes, scale, message):
    name = "pangu_packed_attention_grad" if grad else "pangu_packed_attention"
    with pytest.raises(TilingError, match=f"PanguPackedAttention{'Grad' if grad else ''}: " + message):
        host_side(name).tiling(soc, *described(grad=grad, **changes), [scale])


def test_chip_with_too_little_ub_is_refused():
    with pytest.raises(TilingError, match="the chip has 20000 bytes of UB, expected at least"):
        host_side("pangu_packed_attention").tiling("ascend910b", *described(), [0.1], ub_bytes=20000)


def test_shapes_and_types_are_inferred_for_each_chip():
    forward, backward = host_side("pangu_packed_attention"), host_side("pangu_packed_attention_grad")
    shapes = [(9, 4, 64), (9, 2, 64), (9, 2, 64), (3,)]
    assert forward.infer_shape(shapes, [0.1]) == [(9, 4, 64), (4, 9)]
    assert forward.infer_dtype(["bfloat16"] * 3 + ["int64"], [0.1]) == ["bfloat16", "float32"]
    shapes = shapes[:3] + [(9, 4, 64), (9, 4, 64), (4, 9), (3,)]
    assert backward.infer_shape(shapes, [0.1]) == [(9, 4, 64), (9, 2, 64), (9, 2, 64)]
    assert backward.infer_dtype(["float16"] * 5 + ["float32", "int64"], [0.1]) == ["float16"] * 3
    for op in (forward, backward):
        for soc in ("ascend910b", "ascend310b"):
            inputs = op.definition()["socs"][soc]["inputs"]
            assert inputs["q"] == ["float16", "bfloat16"] and inputs["cu_seqlens"] == ["int64", "int64"]
