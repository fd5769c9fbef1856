"""The vector unit of the host harness computes what NumPy computes in double precision, rounded once; in the lanes that
masks, repeats and strides select, and nowhere else."""

import functools
import itertools
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ascend_kernels.host.harness import CheckFailed, compile_kernel, to_dtype, to_float64

SOCS = ("ascend910b", "ascend310b")
ON_910B, ON_310B = SOCS[:1], SOCS[1:]

ARITHMETIC = """#include "kernel_operator.h"
using namespace AscendC;

struct Parameters {
  int32_t counts[3], count, mode, repeat;  // elements of a, b and out; then what the instruction is given
  int32_t strides[6];
  int64_t lanes, integer;
  uint64_t mask[2];
  float scalar;
  int32_t unused;
};

template <typename T>
__aicore__ inline T Scalar(const Parameters& p) {
  if constexpr (std::is_integral<T>::value) {
    return static_cast<T>(p.integer);
  } else {
    return static_cast<T>(p.scalar);
  }
}

template <typename T>
__aicore__ inline GlobalTensor<T> Gm(GM_ADDR address, int32_t count) {
  GlobalTensor<T> tensor;
  tensor.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(address), count);
  return tensor;
}

template <typename T>
__aicore__ inline LocalTensor<T> Take(TPipe& pipe, TBuf<TPosition::VECCALC>& buffer, GM_ADDR address, int32_t count) {
  pipe.InitBuffer(buffer, count * sizeof(T));
  DataCopyPad(buffer.Get<uint8_t>(), Gm<uint8_t>(address, count * sizeof(T)),
              DataCopyExtParams(1, count * sizeof(T), 0, 0, 0), DataCopyPadExtParams<uint8_t>());
  return buffer.Get<T>();
}

// Three tensors in UB, an instruction on them, and the first back to GM.
template <typename D, typename A, typename B, typename Call>
__aicore__ inline void Run(GM_ADDR a, GM_ADDR b, GM_ADDR out, const Parameters& p, Call call) {
  TPipe pipe;
  TBuf<TPosition::VECCALC> buffers[3];
  const LocalTensor<D> d = Take<D>(pipe, buffers[0], out, p.counts[2]);
  const LocalTensor<A> x = Take<A>(pipe, buffers[1], a, p.counts[0]);
  const LocalTensor<B> y = Take<B>(pipe, buffers[2], b, p.counts[1]);
  PipeBarrier<PIPE_ALL>();
  call(d, x, y);
  PipeBarrier<PIPE_ALL>();
  DataCopyPad(Gm<uint8_t>(out, p.counts[2] * sizeof(D)), buffers[0].Get<uint8_t>(),
              DataCopyExtParams(1, p.counts[2] * sizeof(D), 0, 0, 0));
}

// given: out's memory, because it has values before.
extern "C" __global__ __aicore__ void arithmetic(GM_ADDR a, GM_ADDR b, GM_ADDR given, GM_ADDR out, GM_ADDR workspace,
                                                 GM_ADDR tiling) {
  GET_TILING_DATA_WITH_STRUCT(Parameters, p, tiling);
  uint64_t mask[2] = {p.mask[0], p.mask[1]};
  const uint64_t lanes = p.lanes;
  const int32_t* s = p.strides;
  const UnaryRepeatParams unary(s[0], s[1], s[3], s[4]);
  const BinaryRepeatParams binary(s[0], s[1], s[2], s[3], s[4], s[5]);
  const CopyRepeatParams copy(s[0], s[1], s[3], s[4]);
"""
PARAMETERS = np.dtype([("counts", "3i4"), ("count", "i4"), ("mode", "i4"), ("repeat", "i4"), ("strides", "6i4"),
                       ("lanes", "i8"), ("integer", "i8"), ("mask", "2u8"), ("scalar", "f4"), ("unused", "i4")])
NUMPY = {"float": np.float32, "half": np.float16, "int8_t": np.int8, "uint8_t": np.uint8, "int16_t": np.int16,
         "uint16_t": np.uint16, "int32_t": np.int32, "uint32_t": np.uint32, "int64_t": np.int64,
         "bfloat16_t": np.uint16}
FLOATS = ("half", "float")
SIGNED = ("int16_t", "half", "int32_t", "float")
WORDS = ("int16_t", "uint16_t", "half", "bfloat16_t", "int32_t", "uint32_t", "float")
UNARY = {"Exp": np.exp, "Ln": np.log, "Abs": np.abs, "Reciprocal": np.reciprocal, "Sqrt": np.sqrt,
         "Rsqrt": lambda x: 1 / np.sqrt(x), "Relu": lambda x: np.maximum(x, 0)}
BINARY = {"Add": (np.add, SIGNED), "Sub": (np.subtract, SIGNED), "Mul": (np.multiply, SIGNED),
          "Div": (np.divide, FLOATS),
          "Max": (np.maximum, SIGNED), "Min": (np.minimum, SIGNED), "And": (np.bitwise_and, ("int16_t", "uint16_t")),
          "Or": (np.bitwise_or, ("int16_t", "uint16_t"))}
INTEGERS = ("int16_t", "uint16_t", "int32_t", "uint32_t")
WITH_SCALAR = {"Adds": (np.add, SIGNED), "Muls": (np.multiply, SIGNED), "Maxs": (np.maximum, SIGNED),
               "Mins": (np.minimum, SIGNED), "ShiftLeft": (None, INTEGERS), "ShiftRight": (None, INTEGERS)}
ATOMIC = {"int8_t": ON_910B, "int16_t": SOCS, "half": SOCS, "bfloat16_t": ON_910B, "int32_t": SOCS, "float": SOCS}
NONE, RINT, FLOOR, CEIL, ROUND, TRUNC, ODD = range(7)
ROUNDINGS = (RINT, FLOOR, CEIL, ROUND, TRUNC)
# (source, destination): the round modes that CANN's page of Cast lists.
CASTS = {("int8_t", "half"): (NONE,), ("uint8_t", "half"): (NONE,), ("int16_t", "half"): (*ROUNDINGS, NONE),
         ("int16_t", "float"): (NONE,), ("half", "int8_t"): (*ROUNDINGS, NONE), ("half", "uint8_t"): (*ROUNDINGS, NONE),
         ("half", "int16_t"): ROUNDINGS, ("half", "int32_t"): ROUNDINGS, ("half", "float"): (NONE,),
         ("bfloat16_t", "int32_t"): ROUNDINGS, ("bfloat16_t", "float"): (NONE,), ("int32_t", "int16_t"): (NONE,),
         ("int32_t", "half"): (NONE,), ("int32_t", "float"): (*ROUNDINGS, NONE), ("int32_t", "int64_t"): (NONE,),
         ("float", "int16_t"): ROUNDINGS, ("float", "half"): (*ROUNDINGS, ODD, NONE),
         ("float", "bfloat16_t"): ROUNDINGS, ("float", "int32_t"): ROUNDINGS,
         ("float", "float"): ROUNDINGS, ("float", "int64_t"): ROUNDINGS,
         ("int64_t", "int32_t"): (NONE,), ("int64_t", "float"): ROUNDINGS}
CASTS_OF_310B_ONLY = (("int32_t", "half"),)  # 910B scales it by SetDeqScale


@functools.cache
def instructions():
    """{(name, types of out, a and b): (its call on d, x, y and p, chips)} of all that the arithmetic kernel can do."""
    found = {}

    def add(name, call, out, a=None, b=None, socs=SOCS):
        found[name, out, a or out, b or a or out] = (call, socs)

    def masked(name, call, *types):
        add(name, f"if (p.lanes > 0) {call.replace('MASK', 'lanes')} else {call.replace('MASK', 'mask')}", *types)

    for name, type_ in itertools.product(UNARY, FLOATS):
        add(name, f"{name}(d, x, p.count);", type_)
    add("Abs", "Abs(d, x, p.count);", "int16_t", socs=ON_310B)
    add("Relu", "Relu(d, x, p.count);", "int32_t")
    for type_ in ("int16_t", "uint16_t"):
        add("Not", "Not(d, x, p.count);", type_)
    for name, (_, types) in BINARY.items():
        for type_ in types:
            add(name, f"{name}(d, x, y, p.count);", type_)
    for name, (_, types) in WITH_SCALAR.items():
        for type_ in types:
            add(name, f"{name}(d, x, Scalar<{type_}>(p), p.count);", type_)
    for out, type_, socs in (("half", "half", SOCS), ("float", "float", SOCS), ("float", "half", ON_910B)):
        add("Axpy", f"Axpy(d, x, Scalar<{type_}>(p), p.count);", out, type_)
        add("MulAddDst", "MulAddDst(d, x, y, p.count);", out, type_, socs=socs)
    for (source, out) in CASTS:
        add("Cast", "Cast(d, x, static_cast<RoundMode>(p.mode), p.count);", out, source,
            socs=ON_310B if (source, out) in CASTS_OF_310B_ONLY else SOCS)
    for type_ in WORDS:
        scalar = "bfloat16_t{static_cast<uint16_t>(p.integer)}" if type_ == "bfloat16_t" else f"Scalar<{type_}>(p)"
        socs = ON_910B if type_ == "bfloat16_t" else SOCS
        add("Duplicate", f"Duplicate(d, {scalar}, p.count);", type_, socs=socs)
        masked("Copy", "Copy(d, x, MASK, p.repeat, copy);", type_)
        add("Gather", "Gather(d, x, y, p.mode, p.count);", type_, type_, "uint32_t", socs=socs)
        add("Brcb", "Brcb(d, x, p.repeat, BrcbRepeatParams(s[0], s[3]));", type_, socs=ON_910B)
    for type_ in SIGNED:
        add("CreateVecIndex", f"CreateVecIndex(d, Scalar<{type_}>(p), p.count);", type_)
    for type_ in ("int16_t", "uint16_t", "half"):
        add("Transpose", "Transpose(d, x);", type_)
    for type_ in ("half", "float", "int32_t"):
        add("Compares", f"CompareScalar(d, x, Scalar<{type_}>(p), static_cast<CMPMODE>(p.mode), p.count);", "uint8_t",
            type_)
        add("Compare", "Compare(d, x, y, static_cast<CMPMODE>(p.mode), p.count);", "uint8_t", type_,
            socs=ON_910B if type_ == "int32_t" else SOCS)
    add("rows in", "DataCopyPad(d, Gm<int8_t>(a, p.counts[0]), "
        "DataCopyExtParams(p.repeat, p.count, s[0], s[3], 0), "
        "DataCopyPadExtParams<int8_t>(true, s[1], s[2], Scalar<int8_t>(p)));", "int8_t")
    add("rows out", "const auto gm = Gm<int8_t>(out, p.counts[2]); "
        "DataCopyPad(gm, x, DataCopyExtParams(p.repeat, p.count, s[3], s[0], 0)); PipeBarrier<PIPE_ALL>(); "
        "DataCopyPad(d, gm, DataCopyExtParams(1, p.counts[2], 0, 0, 0), DataCopyPadExtParams<int8_t>());",
        "int8_t")
    for type_, socs in ATOMIC.items():
        add("SetAtomicAdd", f"const auto gm = Gm<{type_}>(out, p.counts[2]); SetAtomicAdd<{type_}>(); "
            "DataCopy(gm, x, p.count); SetAtomicNone(); PipeBarrier<PIPE_ALL>(); DataCopy(d, gm, p.count);", type_,
            socs=socs)
    for type_ in FLOATS:
        add("masked Compare", "Compare(d, x, y, static_cast<CMPMODE>(p.mode), lanes, p.repeat, binary);", "uint8_t",
            type_)
        other = "float" if type_ == "half" else "half"
        masked("masked Add", "Add(d, x, y, MASK, p.repeat, binary);", type_)
        masked("Add to itself", "Add(d, x, d, MASK, p.repeat, binary);", type_)
        masked("masked Adds", f"Adds(d, x, Scalar<{type_}>(p), MASK, p.repeat, unary);", type_)
        masked("masked Abs", "Abs(d, x, MASK, p.repeat, unary);", type_)
        masked("masked MulAddDst", "MulAddDst(d, x, y, MASK, p.repeat, binary);", type_)
        masked("masked Duplicate", f"Duplicate(d, Scalar<{type_}>(p), MASK, p.repeat, s[0], s[3]);", type_)
        masked("masked Cast", "Cast(d, x, RoundMode::CAST_NONE, MASK, p.repeat, unary);", type_, other)
        masked("masked Select", "Select(d, y, x, x[128], SELMODE::VSEL_TENSOR_TENSOR_MODE, MASK, p.repeat, binary);",
               type_, type_, "uint8_t")
        for mode, name in enumerate(("CMPMASK_SPR", "TENSOR_SCALAR_MODE", "TENSOR_TENSOR_MODE")):
            other = f"Scalar<{type_}>(p)" if mode == 1 else "x[p.count]"
            add(f"Select {mode}", f"Select(d, y, x, {other}, SELMODE::VSEL_{name}, p.count);", type_, type_, "uint8_t")
        for kind in ("Max", "Min"):
            add(f"Reduce{kind}", f"Reduce{kind}(d, x, y, p.count, p.mode != 0);", type_)
            masked(f"WholeReduce{kind}", f"WholeReduce{kind}<{type_}>(d, x, MASK, p.repeat, s[3], s[1], s[4], "
                                         "static_cast<ReduceOrder>(p.mode));", type_)
        add("ReduceSum", "ReduceSum(d, x, y, p.count);", type_)
        masked("WholeReduceSum", f"WholeReduceSum<{type_}>(d, x, MASK, p.repeat, s[3], s[1], s[4]);", type_)
        for name in ("BlockReduceSum", "BlockReduceMax", "BlockReduceMin", "PairReduceSum"):
            masked(name, f"{name}<{type_}>(d, x, p.repeat, MASK, s[3], s[1], s[4]);", type_)
    return found


def arithmetic_source(soc):
    lines = [ARITHMETIC.rstrip("\n")]
    for key, ((_, *types), (call, socs)) in enumerate(instructions().items()):
        if soc in socs:
            d, x, y = (f"const LocalTensor<{type_}>& {name}" for type_, name in zip(types, "dxy", strict=True))
            lines.append(f"  if (TILING_KEY_IS({key}))")
            lines.append(f"    Run<{', '.join(types)}>(a, b, out, p, [&]({d}, {x}, {y}) {{ {call} }});")
    return "\n".join([*lines, "}", ""])


BEYOND = np.full(64, 0xa5, np.uint8)  # behind what an instruction may touch


def run(build, soc, name, out, a, b=None, types=None, exact=False, **parameters):
    """`out` after an instruction on it, a and b; types where NumPy's do not tell them: bfloat16 is stored as uint16.

    exact: the UB buffer of out ends with it, instead of BEYOND, which stays as it is.
    """
    b = a[:1] if b is None else b
    types = types or tuple(next(type_ for type_, dtype in NUMPY.items() if array.dtype == dtype)
                           for array in (out, a, b))
    key = list(instructions()).index((name, *types))
    beyond = BEYOND[:0 if exact else None].view(out.dtype)
    memory = np.concatenate([out, beyond])
    packed = np.zeros((), PARAMETERS)
    packed["counts"] = a.size, b.size, memory.size
    for field, value in ({"count": out.size, "lanes": 0} | parameters).items():
        packed[field] = value
    build[soc].launch(1, [a, b, memory], [memory], packed.tobytes(), tiling_key=key)
    np.testing.assert_array_equal(memory[out.size:].view(np.uint8), beyond.view(np.uint8))
    return memory[:out.size]


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """The arithmetic kernel of each chip."""
    folder = tmp_path_factory.mktemp("arithmetic")

    def build(soc):
        source = folder / soc / "arithmetic.cpp"
        source.parent.mkdir()
        source.write_text(arithmetic_source(soc), encoding="utf-8")
        return compile_kernel(source, soc, {}, None)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(SOCS, pool.map(build, SOCS), strict=True))


# Numbers of float16 and float32 at the edges of their formats.
EDGES = {np.float16: [0, -0.0, 1, -1, 6e-8, -6e-8, 6.1e-5, 65504, -65504, np.inf, -np.inf, np.nan, 2**-14, 1 + 2**-10],
         np.float32: [0, -0.0, 1, -1, 1e-45, -1e-45, 1.2e-38, 3.4e38, -3.4e38, np.inf, -np.inf, np.nan, 1 + 2**-23,
                      65504]}


def floats(seed, dtype, size=4096):
    """Numbers of all magnitudes, and every pair of edges for arrays of one seed and the next."""
    random = np.random.default_rng(seed)
    bits = random.integers(0, 256, size * np.dtype(dtype).itemsize, np.uint8).view(dtype)
    values = np.where(random.random(size) < 0.5, bits, random.normal(0, 3, size).astype(dtype))
    edges = np.array(EDGES[dtype], dtype)
    pairs = np.tile(edges, len(edges)) if seed % 2 else np.repeat(edges, len(edges))
    return np.concatenate([values, pairs]).astype(dtype)[:size]


def quiet(function, *arguments):
    with np.errstate(all="ignore"):
        return function(*arguments)


def rounded_once(function, *arrays):
    """The function in double precision, rounded to the arrays' type."""
    dtype = arrays[0].dtype
    return quiet(lambda: function(*(array.astype(np.float64) for array in arrays)).astype(dtype))


def assert_ulps(ours, expected, ulps):
    """Equal but for a few units in the last place; NaN like NaN, zeros of either sign alike."""
    if not ulps:
        np.testing.assert_array_equal(ours, expected)
        return
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(ours[~finite], expected[~finite])
    distance = np.abs(ours[finite].astype(np.float64) - expected[finite].astype(np.float64))
    assert (distance <= ulps * quiet(np.spacing, np.abs(expected[finite])).astype(np.float64)).all()


on_both = pytest.mark.parametrize("soc", SOCS)


@on_both
@pytest.mark.parametrize("name", UNARY)
def test_functions_of_one_number(build, soc, name):
    for dtype in (np.float16, np.float32):
        x = np.concatenate([floats(1, dtype), np.random.default_rng(0).uniform(0, 20, 512).astype(dtype)])
        # exp and ln are the C library's in float32, at most one unit off; the rest is exact before the rounding.
        ulps = 1 if name in ("Exp", "Ln") else 0
        assert_ulps(run(build, soc, name, np.zeros_like(x), x), rounded_once(UNARY[name], x), ulps)
    if name == "Relu" or (name == "Abs" and soc == "ascend310b"):
        x = np.random.default_rng(0).integers(-2**15, 2**15, 999, np.int16 if name == "Abs" else np.int32)
        np.testing.assert_array_equal(run(build, soc, name, np.zeros_like(x), x), UNARY[name](x))


@on_both
@pytest.mark.parametrize("name", BINARY)
def test_functions_of_two_numbers(build, soc, name):
    function, types = BINARY[name]
    for type_ in types:
        dtype = NUMPY[type_]
        if type_ in FLOATS:
            x, y = floats(1, dtype), floats(2, dtype)
            expected = rounded_once(function, x, y)
        else:  # integers wrap around
            limits = np.iinfo(dtype)
            x, y = np.random.default_rng(1).integers(limits.min, limits.max, (2, 999), dtype, endpoint=True)
            expected = function(x, y)
        np.testing.assert_array_equal(run(build, soc, name, np.zeros_like(x), x, y), expected)


@on_both
@pytest.mark.parametrize("name", WITH_SCALAR)
def test_functions_of_a_number_and_a_scalar(build, soc, name):
    function, types = WITH_SCALAR[name]
    for type_ in types:
        dtype = NUMPY[type_]
        if type_ in FLOATS:
            x = floats(1, dtype)
            for scalar in (0.0, -1.75, 3e-5, 40000.0, np.inf):
                expected = rounded_once(function, x, np.full_like(x, scalar))
                np.testing.assert_array_equal(run(build, soc, name, np.zeros_like(x), x, scalar=scalar), expected)
            continue
        limits = np.iinfo(dtype)
        x = np.random.default_rng(1).integers(limits.min, limits.max, 999, dtype, endpoint=True)
        x[:3] = 0, 1, limits.max
        for scalar in ((0, 1, 5, limits.bits - 1, limits.bits) if function is None else (0, -7, 12345)):
            if function is None:  # by Python's integers, which have no width
                shifted = [int(value) << scalar if name == "ShiftLeft" else int(value) >> scalar for value in x]
                expected = np.array([value & (2**limits.bits - 1) for value in shifted], np.uint64).astype(dtype)
            else:
                expected = quiet(function, x, dtype(scalar))
            np.testing.assert_array_equal(run(build, soc, name, np.zeros_like(x), x, integer=scalar), expected)


@on_both
def test_not_and_products_that_are_added(build, soc):
    for dtype in (np.int16, np.uint16):
        x = np.arange(-500, 500).astype(dtype)
        np.testing.assert_array_equal(run(build, soc, "Not", np.zeros_like(x), x), ~x)
    random = np.random.default_rng(0)
    for out, source in ((np.float16, np.float16), (np.float32, np.float32), (np.float32, np.float16)):
        d, x, y = (random.normal(0, 3, 999).astype(dtype) for dtype in (out, source, source))
        # The product is rounded to the result's type, and then the sum.
        product = (x.astype(np.float64) * y).astype(out)
        if soc == "ascend910b" or out == source:
            np.testing.assert_array_equal(run(build, soc, "MulAddDst", d, x, y), rounded_once(np.add, d, product))
        scalar = source(0.375)
        product = (x.astype(np.float64) * scalar).astype(out)
        np.testing.assert_array_equal(run(build, soc, "Axpy", d, x, scalar=scalar), rounded_once(np.add, d, product))


def choose(mode, below, above, is_upper_odd, negative):
    """Whether to take the upper of two neighbours; below, above: the distances to them, both over zero."""
    nearest = above < below
    tie = above == below
    return {FLOOR: np.zeros_like(negative), CEIL: np.ones_like(negative), TRUNC: negative, ODD: is_upper_odd,
            ROUND: nearest | (tie & ~negative)}.get(mode, nearest | (tie & ~is_upper_odd))


@functools.cache
def ladder(target):
    """All numbers of a 16-bit format in order with their bits; infinity counts as the next step after the largest."""
    magnitude = np.arange(0, 0x7c01 if target == "half" else 0x7f81, dtype=np.uint16)
    values = (magnitude.view(np.float16).astype(np.float64) if target == "half"
              else (magnitude.astype(np.uint32) << 16).view(np.float32).astype(np.float64))
    values[-1] = 2 * values[-2] - values[-3]
    return np.concatenate([-values[:0:-1], values]), np.concatenate([magnitude[:0:-1] | 0x8000, magnitude])


def to_16_bits(x, target, mode):
    """float64 to the bits of half or bfloat16_t by looking the neighbours up."""
    values, bits = ladder(target)
    at = np.clip(np.searchsorted(values, x), 1, len(values) - 1)
    low, high = values[at - 1], values[at]
    up = choose(mode, x - low, high - x, (bits[at] & 1) == 1, x < 0)
    up |= (x == high) & (at < len(values) - 1)
    result = np.where(up, bits[at], bits[at - 1])
    result = np.where(np.isinf(x), np.where(x > 0, bits[-1], bits[0]), result)
    sign_of_zero = np.where(np.signbit(x) & (result == 0), 0x8000, 0)
    return np.where(np.isnan(x), 0x7e00 if target == "half" else 0x7fc0, result | sign_of_zero).astype(np.uint16)


def to_whole(x, mode):
    """float64 to whole numbers in float64."""
    low, high = np.floor(x), np.ceil(x)
    up = choose(mode, x - low, high - x, high % 2 == 1, x < 0)
    return np.where(low == high, x, np.where(up, high, low))


def integer_to_float32(x, mode):
    """By integer arithmetic: 24 bits are kept."""
    result = []
    for value in map(int, x):
        shift = max(0, abs(value).bit_length() - 24)
        low = value >> shift
        below = value - (low << shift)
        if below:
            above, is_upper_odd, negative = (1 << shift) - below, (low + 1) % 2 == 1, value < 0
            low += int(choose(mode, *(np.array(each) for each in (below, above, is_upper_odd, negative))))
        result.append(np.float32(low << shift))
    return np.array(result)


def cast_expected(x, source, out, mode):
    if source == "bfloat16_t":
        x = (x.astype(np.uint32) << 16).view(np.float32)
    if out in ("half", "bfloat16_t"):
        return to_16_bits(x.astype(np.float64), out, mode).view(NUMPY[out])
    if out == "float" and source in ("int32_t", "int64_t"):
        return integer_to_float32(x, mode)
    if out == "float":
        return to_whole(x.astype(np.float64), mode).astype(np.float32) if source == "float" else x.astype(np.float32)
    limits = np.iinfo(NUMPY[out])  # what does not fit becomes the limit, NaN zero
    whole = x if np.issubdtype(x.dtype, np.integer) else np.nan_to_num(to_whole(x.astype(np.float64), mode), nan=0)
    return np.array([min(max(int(value) if np.isfinite(value) else int(np.sign(value)) << 80, limits.min), limits.max)
                     for value in whole], NUMPY[out])


@pytest.mark.parametrize("soc, source, out", [(soc, *pair) for pair in CASTS for soc in SOCS
                                              if soc == "ascend310b" or pair not in CASTS_OF_310B_ONLY])
def test_casts_round_in_every_documented_mode(build, soc, source, out):
    random, dtype = np.random.default_rng(5), NUMPY[source]
    if source in ("half", "bfloat16_t"):
        x = np.arange(65536, dtype=np.uint16).view(dtype)[random.permutation(65536)[:8192]]
    elif source == "float":
        halves = np.arange(0, 0x7c00, 7, dtype=np.uint16).view(np.float16).astype(np.float32)
        bfloats = (np.arange(0, 0x7f80, 7, dtype=np.uint32) << 16).view(np.float32)
        limits = [65519, 65520, 65535, 65536, 1e6, 2.0**31, -2.0**31, 2.0**63, -2.0**63, 1e30, 32767.5, -32768.5,
                  3.39e38, 3.3962e38]
        x = quiet(np.concatenate, [floats(1, np.float32), np.arange(-40, 40) / 4, limits])
        for grid in (halves, bfloats):  # ties, and numbers beside them
            middle = (grid[1:] + (grid[:-1] - grid[1:]) / 2)[::4]
            x = np.concatenate([x, middle, -middle, quiet(np.nextafter, middle, np.float32(np.inf))])
        x = x.astype(np.float32)
    else:
        limits = np.iinfo(dtype)
        small = random.integers(-1000 if limits.min else 0, 1000 if limits.bits > 8 else 127, 500)
        x = np.concatenate([random.integers(limits.min, limits.max, 2000, dtype, endpoint=True), small,
                            [limits.min, limits.max]])
        if limits.bits > 8:  # where half has gaps
            x = np.concatenate([x, [2047, 2048, 2049, 2051, 4098]])
        if limits.bits >= 32:  # where float has gaps
            near = 2**24 + np.arange(-5, 40)
            x = np.concatenate([x, near, -near, 2 * near])
        x = x.astype(dtype)
    for mode in CASTS[source, out]:
        ours = run(build, soc, "Cast", np.zeros(x.size, NUMPY[out]), x, types=(out, source, source), mode=mode)
        expected = quiet(cast_expected, x, source, out, mode)
        if np.issubdtype(NUMPY[out], np.floating):
            np.testing.assert_array_equal(ours, expected)
            ours, expected = np.signbit(ours), np.signbit(expected)
            same = np.isnan(x.astype(np.float64)) if source != "bfloat16_t" else np.zeros(x.size, bool)
            ours, expected = ours[~same], expected[~same]
        elif out == "bfloat16_t":
            is_nan = np.isnan(x)
            assert ((ours[is_nan] & 0x7fff) > 0x7f80).all()
            ours, expected = ours[~is_nan], expected[~is_nan]
        np.testing.assert_array_equal(ours, expected)


@on_both
def test_modes_that_the_documentation_does_not_list_are_refused(build, soc):
    random = np.random.default_rng(SOCS.index(soc))
    for (source, out), modes in CASTS.items():
        if (source, out) in CASTS_OF_310B_ONLY and soc == "ascend910b":
            continue
        x = np.ones(64, NUMPY[source])
        mode = random.choice([*{*range(8)} - {*modes}])
        with pytest.raises(CheckFailed, match=f"Cast mode: .*RoundMode {mode} is not defined"):
            run(build, soc, "Cast", np.zeros(64, NUMPY[out]), x, types=(out, source, source), mode=mode)


@on_both
def test_fill_count_and_rearrange(build, soc):
    random = np.random.default_rng(2)
    for type_ in WORDS if soc == "ascend910b" else [type_ for type_ in WORDS if type_ != "bfloat16_t"]:
        dtype = NUMPY[type_]
        scalar = dtype(-3.140625 if type_ in FLOATS else 40000 if type_ in ("uint32_t", "bfloat16_t") else 300)
        given = {"scalar": scalar} if type_ in FLOATS else {"integer": int(scalar)}
        ours = run(build, soc, "Duplicate", np.zeros(77, dtype), np.zeros(1, dtype), types=(type_,) * 3, **given)
        np.testing.assert_array_equal(ours, np.full(77, scalar))
        x = random.integers(0, 2**15, 300).astype(np.uint16 if dtype(0).itemsize == 2 else np.uint32).view(dtype)
        chosen = random.integers(0, 250, 199)
        ours = run(build, soc, "Gather", np.zeros(199, dtype), x, (chosen * x.itemsize).astype(np.uint32),
                   types=(type_, type_, "uint32_t"), mode=50 * x.itemsize)
        np.testing.assert_array_equal(ours.tobytes(), x[chosen + 50].tobytes())
        if soc == "ascend910b":
            per_block = 32 // x.itemsize
            ours = run(build, soc, "Brcb", np.zeros(3 * 20 * per_block, dtype), x[:24], types=(type_,) * 3, repeat=3,
                       strides=[2, 0, 0, 20, 0, 0])
            expected = np.zeros((3, 20, per_block), dtype)
            expected[:, 0:16:2] = x[:24].reshape(3, 8, 1)
            np.testing.assert_array_equal(ours.tobytes(), expected.tobytes())
    for type_ in SIGNED:
        given = {"scalar": -2.5} if type_ in FLOATS else {"integer": -7}
        (first,) = given.values()
        ours = run(build, soc, "CreateVecIndex", np.zeros(500, NUMPY[type_]), np.zeros(1, NUMPY[type_]), **given)
        np.testing.assert_array_equal(ours, np.arange(500) + NUMPY[type_](first))
    for dtype in (np.int16, np.uint16, np.float16):
        x = np.arange(256).astype(dtype)
        ours = run(build, soc, "Transpose", np.zeros(256, dtype), x)
        np.testing.assert_array_equal(ours, x.reshape(16, 16).T.ravel())


@on_both
def test_comparisons_write_their_bits_from_the_lowest_on(build, soc):
    functions = (np.less, np.greater, np.equal, np.less_equal, np.greater_equal, np.not_equal)
    for dtype in (np.float16, np.float32, np.int32):
        if dtype == np.int32:
            x, y = np.random.default_rng(0).integers(-3, 4, (2, 256), dtype)
        else:
            x, y = floats(1, dtype, 512)[-256:], floats(2, dtype, 512)[-256:]
        bits = np.zeros(x.size // 8, np.uint8)
        for mode, function in enumerate(functions):
            if dtype != np.int32 or (soc == "ascend910b" and function is np.equal):
                ours = run(build, soc, "Compare", bits, x, y, count=x.size, mode=mode)
                np.testing.assert_array_equal(ours, np.packbits(function(x, y), bitorder="little"))
            if dtype != np.int32 or soc == "ascend310b" or function is np.equal:
                ours = run(build, soc, "Compares", bits, x, count=x.size, mode=mode, scalar=1, integer=1)
                np.testing.assert_array_equal(ours, np.packbits(function(x, dtype(1)), bitorder="little"))


@on_both
def test_comparisons_by_repeats_take_all_lanes(build, soc):
    """Eight or sixteen bytes of bits for a repeat; 910B ignores the mask, 310B needs a full one."""
    random = np.random.default_rng(4)
    for dtype in (np.float16, np.float32):
        x, y = random.integers(-2, 3, (2, 2048)).astype(dtype)
        num_lanes, lane = 256 // x.itemsize, np.arange(256 // x.itemsize)
        ours = run(build, soc, "masked Compare", np.zeros(3 * num_lanes // 8, np.uint8), x, y, mode=0, repeat=3,
                   lanes=num_lanes - 5 if soc == "ascend910b" else num_lanes, strides=[0, 1, 2, 0, 9, 16])
        bits = [x[places(lane, r, x.itemsize, 1, 9)] < y[places(lane, r, x.itemsize, 2, 16)] for r in range(3)]
        np.testing.assert_array_equal(ours, np.packbits(bits, bitorder="little"))


@on_both
def test_select_takes_the_first_where_the_bit_is_set(build, soc):
    for dtype in (np.float16, np.float32):
        x = np.arange(400).astype(dtype)
        count, lanes = 192, 256 // x.itemsize
        bits = np.random.default_rng(1).integers(0, 256, 64, np.uint8)
        set_ = np.unpackbits(bits, bitorder="little").astype(bool)
        for mode, chosen in ((0, np.tile(set_[:lanes], 4)), (1, set_), (2, set_)):
            other = -1.5 if mode == 1 else x[count:2 * count]
            ours = run(build, soc, f"Select {mode}", np.zeros(count, dtype), x, bits, scalar=-1.5)
            np.testing.assert_array_equal(ours, np.where(chosen[:count], x[:count], other))


@on_both
def test_copies_of_rows(build, soc):
    """Rows of any length, apart in GM by bytes and in UB by blocks, where each starts anew and may be padded."""
    random = np.random.default_rng(11)
    for _ in range(100):
        num_rows, length = int(random.integers(1, 9)), int(random.integers(1, 140))
        gm_gap, ub_gap = int(random.integers(0, 40)), int(random.integers(0, 4))  # bytes, blocks
        left = int(random.integers(0, 33))
        right = -(left + length) % 32  # up to the end of a block
        in_gm, ub_step = num_rows * (length + gm_gap), left + length + right + 32 * ub_gap
        x = random.integers(-99, 99, in_gm).astype(np.int8)
        out = random.integers(-99, 99, num_rows * ub_step).astype(np.int8)
        expected = out.copy()
        for row in range(num_rows):
            to, end = row * ub_step, row * ub_step + left + length + right
            expected[to:end] = -7
            expected[to + left:to + left + length] = x[row * (length + gm_gap):][:length]
        ours = run(build, soc, "rows in", out, x, repeat=num_rows, count=length, integer=-7,
                   strides=[gm_gap, left, right, ub_gap, 0, 0])
        np.testing.assert_array_equal(ours, expected)

        ub_step = length + -length % 32 + 32 * ub_gap
        x = random.integers(-99, 99, num_rows * ub_step).astype(np.int8)
        out = random.integers(-99, 99, in_gm).astype(np.int8)
        expected = out.copy()
        for row in range(num_rows):
            expected[row * (length + gm_gap):][:length] = x[row * ub_step:][:length]
        ours = run(build, soc, "rows out", out, x, repeat=num_rows, count=length,
                   strides=[gm_gap, 0, 0, ub_gap, 0, 0])
        np.testing.assert_array_equal(ours, expected)


def footprint(name, types):
    """(parameters, elements of out, a and b) of a call of an instruction; a and b None where it does not look at them.

    Of tensors that are not larger than a block None too: they cannot be made smaller.
    """
    call, _ = instructions()[name, *types]
    sizes = [np.dtype(NUMPY[type_]).itemsize for type_ in types]
    lanes, repeat = 256 // max(sizes), 8
    count = 1024
    given = {"count": count, "repeat": repeat, "integer": 1, "mode": 0}
    if "p.count" not in call:
        count = repeat * lanes
        steps = [lanes * size // 32 for size in sizes]
        given |= {"lanes": lanes, "strides": [1, 1, 1, *steps]}
    out, a, b = count, *(count if re.search(rf"\b{letter}\b", call) else None for letter in "xy")
    if name == "Cast":
        given["mode"] = CASTS[types[1], types[0]][0]
    elif name in ("Compare", "Compares", "masked Compare"):
        given["mode"], out = 2, count // 8
    elif name == "Gather":
        pass
    elif name.startswith("Select"):
        a, b = {"0": (2 * count, None), "1": (count, count // 8), "2": (2 * count, count // 8)}[name[-1]]
    elif name == "masked Select":
        a, b = 128 + count, count // 8
        given["strides"][5] = given["strides"][4]
    elif name == "Brcb":
        out, a = repeat * 8 * 32 // sizes[0], repeat * 8
        given["strides"] = [1, 0, 0, 8, 0, 0]
    elif name == "Transpose":
        out = a = 256
    elif name.startswith("WholeReduce"):
        values = 1 if name.endswith("Sum") else 2
        out, a = 7 * 16 * values + values, count
        given["strides"] = [0, 1, 0, 16, lanes * sizes[1] // 32, 0]
    elif name.startswith(("BlockReduce", "PairReduce")):
        out, a = repeat * (8 if name.startswith("Block") else lanes // 2), count
        given["strides"] = [0, 1, 0, 1, lanes * sizes[1] // 32, 0]
    elif name.startswith("Reduce"):
        out = b = None
    elif name.startswith("rows"):
        given["repeat"] = 1
        a = count
    return given, (out, a, b)


@on_both
def test_no_instruction_leaves_the_buffers_of_its_operands(build, soc):
    """Each works on buffers that end with its operands, and is stopped where one ends a block of 32 bytes earlier."""
    stopped = set()  # one type of each size is enough
    for (name, *types), (_, socs) in instructions().items():
        if soc not in socs:
            continue
        given, sizes = footprint(name, types)
        arrays = [np.zeros(size or 512, NUMPY[type_]) for size, type_ in zip(sizes, types, strict=True)]
        if name == "Gather":
            arrays[2][:] = arrays[1].nbytes - arrays[1].itemsize
        run(build, soc, name, *arrays, types=types, exact=True, **given)
        kind = (name, *(array.itemsize for array in arrays))
        for place, size in enumerate(sizes):
            if size is not None and kind not in stopped:
                blocks = -(-arrays[place].nbytes // 32)
                smaller = [*arrays]
                smaller[place] = arrays[place][:(blocks - 1) * 32 // arrays[place].itemsize]
                with pytest.raises(CheckFailed, match=r"out of bounds: arithmetic, core 0, \w+ at arithmetic\.cpp"):
                    run(build, soc, name, *smaller, types=types, exact=True, **given)
        stopped.add(kind)


@on_both
def test_reductions_need_the_documented_scratch(build, soc):
    """1024 floats are 16 repeats: a value and an index of each, then of these; a sum needs one number of each."""
    x, out = np.zeros(1024, np.float32), np.zeros(8, np.float32)
    needed = {("ReduceMax", 1): 32 + 8, ("ReduceMin", 0): 32, ("ReduceSum", 0): 16 if soc == "ascend310b" else 8}
    for (name, with_index), size in needed.items():
        run(build, soc, name, out, x, np.zeros(size, np.float32), count=1024, mode=with_index)
        if size > 8:
            with pytest.raises(CheckFailed, match="out of bounds: .*sharedTmpBuffer covers"):
                run(build, soc, name, out, x, np.zeros(size - 8, np.float32), count=1024, mode=with_index)


# ---- Masks, repeats and strides -------------------------------------------------------------------------------------


def places(lane, repeat, itemsize, block_stride, repeat_stride):
    """Index of a lane's element."""
    per_block = 32 // itemsize
    return (repeat * repeat_stride + lane // per_block * block_stride) * per_block + lane % per_block


def random_mask(random, num_lanes):
    """(parameters, the lanes that take part): as a number of lanes, or as bits."""
    if random.random() < 0.5:
        count = int(random.integers(1, num_lanes + 1))
        return {"lanes": count}, np.arange(num_lanes) < count
    active = random.random(num_lanes) < 0.4
    active[random.integers(num_lanes)] = True
    words = np.packbits(np.concatenate([active, np.zeros(128 - num_lanes, bool)]), bitorder="little").view(np.uint64)
    return {"mask": words}, active


# What a lane does with its elements of dst, x and y, in double precision; Select looks at bits.
LANES = {"Add": lambda d, x, y, dtype: x + y,
         "Adds": lambda d, x, y, dtype: x + 0.625,
         "Abs": lambda d, x, y, dtype: abs(x),
         "MulAddDst": lambda d, x, y, dtype: np.float64(dtype(x * y)) + d,
         "Duplicate": lambda d, x, y, dtype: 0.625,
         "Cast": lambda d, x, y, dtype: x,
         "Copy": lambda d, x, y, dtype: x,
         "Select": None}


@on_both
@pytest.mark.parametrize("name", LANES)
def test_masks_repeats_and_strides(build, soc, name):
    """Against a loop over repeats and lanes, with random masks and strides; elements that no lane reaches stay."""
    random = np.random.default_rng(len(name))
    for dtype, _ in itertools.product((np.float16, np.float32), range(6)):
        source = (np.float32 if dtype == np.float16 else np.float16) if name == "Cast" else dtype
        sizes = (np.dtype(dtype).itemsize, np.dtype(source).itemsize, np.dtype(source).itemsize)
        num_lanes, repeat = 256 // max(sizes), int(random.integers(1, 6))
        given, active = random_mask(random, num_lanes)
        blocks = [int(random.integers(0 if i else 1, 3)) for i in range(3)]
        reach = num_lanes * sizes[0] // 32 * blocks[0]
        repeats = [int(random.integers(reach, reach + 3)), *(int(random.integers(0, 12)) for _ in range(2))]
        out, x, y = (random.normal(0, 2, 4096).astype(each) for each in (dtype, source, source))
        if name == "Select":
            y = random.integers(0, 256, 512, np.uint8)
            set_ = np.unpackbits(y, bitorder="little")
        expected = out.copy()
        for r, lane in itertools.product(range(repeat), np.flatnonzero(active)):
            d, s0, s1 = (places(lane, r, size, block, step)
                         for size, block, step in zip(sizes, blocks, repeats, strict=True))
            if name == "Select":
                expected[d] = x[s0] if set_[r * num_lanes + lane] else x[128 + s1]
            else:
                expected[d] = LANES[name](np.float64(expected[d]), np.float64(x[s0]), np.float64(y[s1]), dtype)
        call, other = (name, None) if name == "Copy" else (f"masked {name}", y)
        ours = run(build, soc, call, out, x, other, repeat=repeat, scalar=0.625, strides=[*blocks, *repeats], **given)
        np.testing.assert_array_equal(ours, expected)


@on_both
def test_sums_over_repeats_add_to_one_place(build, soc):
    """dst is src1 with repeat stride 0: the only way in which a repeat may read what an earlier one wrote."""
    for dtype in (np.float16, np.float32):
        x = np.random.default_rng(6).integers(-9, 10, 1024).astype(dtype)
        lanes = 256 // x.itemsize
        ours = run(build, soc, "Add to itself", np.full(lanes, 3, dtype), x, repeat=5, lanes=lanes,
                   strides=[1, 1, 1, 0, 8, 0])
        np.testing.assert_array_equal(ours, 3 + x[:5 * lanes].reshape(5, lanes).sum(0))


@pytest.mark.parametrize("soc, type_", [(soc, type_) for type_, socs in ATOMIC.items() for soc in socs])
def test_atomic_additions_in_global_memory(build, soc, type_):
    dtype, random = NUMPY[type_], np.random.default_rng(7)
    if type_ == "bfloat16_t":
        before, x = to_dtype(random.normal(0, 3, (2, 512)), "bfloat16")
        ours = run(build, soc, "SetAtomicAdd", before, x, types=(type_,) * 3)
        np.testing.assert_array_equal(ours, to_dtype(to_float64(before) + to_float64(x), "bfloat16"))
        return
    if type_ in FLOATS:
        before, x = floats(1, dtype), floats(2, dtype)
        expected = rounded_once(np.add, before, x)
    else:
        limits = np.iinfo(dtype)
        before, x = random.integers(limits.min, limits.max, (2, 512), dtype, endpoint=True)
        expected = before + x
    np.testing.assert_array_equal(run(build, soc, "SetAtomicAdd", before, x), expected)


def reduced(kind, values):
    """(result, lane) of active lanes: sums of small whole numbers are exact in any order."""
    if kind == "Sum":
        return values.sum(), 0
    at = values.argmax() if kind == "Max" else values.argmin()
    return values[at], at


@on_both
@pytest.mark.parametrize("kind", ["Max", "Min", "Sum"])
def test_reductions_of_repeats(build, soc, kind):
    random = np.random.default_rng(7)
    for dtype, order in itertools.product((np.float16, np.float32), range(4)):
        if (kind == "Sum" and order != 2) or (soc == "ascend310b" and order in (1, 3)):
            continue
        for _ in range(4):
            size, repeat = np.dtype(dtype).itemsize, int(random.integers(1, 6))
            given, active = random_mask(random, 256 // size)
            block, step = int(random.integers(0, 3)), int(random.integers(0, 12))
            x = random.integers(-9, 10, 4096).astype(dtype)
            slots = {0: 2, 1: 2, 2: 1, 3: 4 // size}[order]
            gap = int(random.integers(1, 4))
            out = np.full(repeat * gap * slots + 8, 99, dtype)
            expected = out.copy()
            for r in range(repeat):
                lanes = np.flatnonzero(active)
                value, at = reduced(kind, x[places(lanes, r, size, block, step)])
                # The index is a whole number in the bits of an element, or of uint32 where it stands alone.
                index = np.array([lanes[at]], np.uint16 if size == 2 else np.uint32).view(dtype)
                alone = np.array([lanes[at]], np.uint32).view(dtype)
                parts = {0: [value, *index], 1: [*index, value], 2: [value], 3: list(alone)}[order]
                expected[r * gap * slots:r * gap * slots + len(parts)] = parts
            ours = run(build, soc, f"WholeReduce{kind}", out, x, repeat=repeat, mode=order,
                       strides=[0, block, 0, gap, step, 0], **given)
            np.testing.assert_array_equal(ours.view(np.uint8), expected.view(np.uint8))


@on_both
@pytest.mark.parametrize("name", ["BlockReduceSum", "BlockReduceMax", "BlockReduceMin", "PairReduceSum"])
def test_reductions_of_blocks_and_pairs(build, soc, name):
    random = np.random.default_rng(8)
    for dtype, _ in itertools.product((np.float16, np.float32), range(4)):
        size, repeat = np.dtype(dtype).itemsize, int(random.integers(1, 5))
        group, unit = (2, 128 // size) if name.startswith("Pair") else (32 // size, 8)
        block, step, gap = int(random.integers(0, 3)), int(random.integers(0, 12)), int(random.integers(1, 3))
        given, active = random_mask(random, 256 // size)
        x = random.integers(-9, 10, 4096).astype(dtype)
        out = np.full(repeat * gap * unit, 99, dtype)
        expected = out.copy()
        for r, g in itertools.product(range(repeat), range(256 // size // group)):
            lanes = g * group + np.flatnonzero(active[g * group:(g + 1) * group])
            at = r * gap * unit + g
            if lanes.size:
                expected[at], _ = reduced(name[-3:], x[places(lanes, r, size, block, step)])
            elif soc == "ascend310b":  # 310B writes what changes nothing
                lowest = np.finfo(dtype).min if dtype == np.float16 else -np.inf
                expected[at] = {"Sum": 0, "Max": lowest, "Min": -lowest}[name[-3:]]
        ours = run(build, soc, name, out, x, repeat=repeat, strides=[0, block, 0, gap, step, 0], **given)
        np.testing.assert_array_equal(ours, expected)


@on_both
def test_reductions_of_whole_tensors(build, soc):
    random = np.random.default_rng(9)
    for dtype, count in itertools.product((np.float16, np.float32), (1, 7, 64, 129, 1000, 4000)):
        x = random.integers(-1000, 1000, count).astype(dtype)
        scratch = np.zeros(max(count, 512), dtype)
        out = np.zeros(8, dtype)
        for kind, with_index in itertools.product(("Max", "Min"), (0, 1)):
            ours = run(build, soc, f"Reduce{kind}", out, x, scratch, count=count, mode=with_index)
            value, at = reduced(kind, x)
            assert ours[0] == value
            index = ours[1:2].view(np.uint16 if dtype == np.float16 else np.uint32)[0]
            assert index == (at if with_index else 0)
        x = random.integers(0, 2, count).astype(dtype)
        ours = run(build, soc, "ReduceSum", out, x, scratch, count=count)
        assert ours[0] == x.astype(np.float64).sum() and not ours[1:].any()


@on_both
def test_sums_are_taken_in_a_tree(build, soc):
    """Rounding after rounding in the order of neighbours: 2048 + 1 is lost in half, 1 + 1 before is not."""
    x = np.array([2048, 1, 1, 1, 1, 1, 1, 1] * 16, np.float16)
    ours = run(build, soc, "WholeReduceSum", np.zeros(16, np.float16), x[:8], repeat=1, lanes=8,
               strides=[0, 1, 0, 1, 8, 0])
    assert ours[0] == 2048 + 6
