"""The primitives that the library adds or replaces, against NumPy and torch, in every dtype that they serve."""

import mindspore as ms
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mindspore import Tensor, ops
from mindspore.ops.auto_generate import gen_ops_prim

pytestmark = pytest.mark.usefixtures("mindspore_cpu")

INTEGERS = (np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64)
FLOATS = (np.float16, np.float32, np.float64)
COMPLEX = (np.complex64, np.complex128)
few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def numbers(random, shape, dtype):
    if dtype == np.bool_:
        return random.random(shape) < 0.5
    if np.issubdtype(dtype, np.integer):
        return random.integers(0, 11, shape).astype(dtype)
    array = random.normal(0, 2, shape)
    if np.issubdtype(dtype, np.complexfloating):
        array = array + 1j * random.normal(0, 2, shape)
    return array.astype(dtype)


def rounded(array):
    """What bfloat16 keeps of float32 numbers."""
    return torch.tensor(array).bfloat16().float().numpy()


def as_float32(tensor):
    return tensor.astype(ms.float32).asnumpy()


def run(mode, function, *tensors):
    return (ms.jit(function) if mode == "graph" else function)(*tensors)


def add(x, y):
    return x + y


def subtract(x, y):
    return x - y


def multiply(x, y):
    return x * y


ARITHMETIC = {add: np.add, subtract: np.subtract, multiply: np.multiply}


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("op", ARITHMETIC)
def test_arithmetic_in_every_dtype_is_numpys(mode, op):
    random = np.random.default_rng(0)
    for dtype in (*INTEGERS, *FLOATS, *COMPLEX):
        x, y = numbers(random, (3, 5), dtype), numbers(random, (5,), dtype)
        out = run(mode, op, Tensor(x), Tensor(y)).asnumpy()
        assert out.dtype == dtype
        # Complex products may be fused into one rounding.
        np.testing.assert_allclose(out, ARITHMETIC[op](x, y), rtol=1e-6 if dtype in COMPLEX else 0, atol=1e-6 * (
            dtype in COMPLEX))


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_mixed_operands_are_promoted(mode):
    x, y = np.array([[1.5], [2.5]], np.float32), np.array([1, 2, 3], np.int64)
    out = run(mode, multiply, Tensor(x), Tensor(y)).asnumpy()
    assert out.dtype == np.float32 and np.array_equal(out, x * y)
    out = run(mode, add, Tensor(x, ms.bfloat16), Tensor(x))
    assert out.dtype == ms.float32 and np.array_equal(out.asnumpy(), x + x)


@few
@given(shape=st.lists(st.integers(0, 5), max_size=4), seed=st.integers(0, 999), in_bfloat16=st.booleans(),
       op=st.sampled_from(list(ARITHMETIC)))
def test_any_shapes_broadcast_as_in_numpy(shape, seed, in_bfloat16, op):
    random = np.random.default_rng(seed)
    if in_bfloat16:
        shape = [size or 1 for size in shape]  # MindSpore cannot make an empty bfloat16 tensor from NumPy
    x_shape = [1 if random.random() < 0.3 else size for size in shape][random.integers(0, len(shape) + 1):]
    x = random.normal(0, 1, x_shape).astype(np.float32)
    y = random.normal(0, 1, shape).astype(np.float32)
    if in_bfloat16:
        x, y = rounded(x), rounded(y)
    dtype = ms.bfloat16 if in_bfloat16 else ms.float32
    for first, second in ((x, y), (y, x)):
        expected = ARITHMETIC[op](first, second)
        out = op(Tensor(first, dtype), Tensor(second, dtype))
        assert out.dtype == dtype and np.array_equal(as_float32(out), rounded(expected) if in_bfloat16 else expected)


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_large_arithmetic_is_right_at_every_element(mode):
    random = np.random.default_rng(1)
    x, y = random.normal(0, 1, (300, 401)).astype(np.float32), random.normal(0, 1, (300, 1)).astype(np.float32)
    assert np.array_equal(run(mode, add, Tensor(x), Tensor(x)).asnumpy(), x + x)
    assert np.array_equal(run(mode, multiply, Tensor(x), Tensor(y)).asnumpy(), x * y)
    assert np.array_equal(run(mode, subtract, Tensor(y), Tensor(x)).asnumpy(), y - x)
    x[0, :2] = np.inf, -np.inf
    with np.errstate(invalid="ignore"):  # inf - inf
        expected = x - x
    assert np.array_equal(run(mode, subtract, Tensor(x), Tensor(x)).asnumpy(), expected, equal_nan=True)


def sum_of_three(x, y, z):
    return ops.addn((x, y, z))


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_addn_sums_in_order_and_bfloat16_in_float32(mode):
    random = np.random.default_rng(2)
    arrays = [random.normal(0, 1, (7, 5)).astype(np.float32) for _ in range(3)]
    tensors = [Tensor(array) for array in arrays]
    assert np.array_equal(run(mode, sum_of_three, *tensors).asnumpy(), arrays[0] + arrays[1] + arrays[2])
    arrays = [rounded(array) for array in arrays]
    out = run(mode, sum_of_three, *(Tensor(array, ms.bfloat16) for array in arrays))
    assert np.array_equal(as_float32(out), rounded(arrays[0] + arrays[1] + arrays[2]))
    integers = [np.arange(4), np.arange(4) * 3, np.full(4, 2**40)]
    assert np.array_equal(run(mode, sum_of_three, *map(Tensor, integers)).asnumpy(), sum(integers))


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_exponentials_are_those_of_float64_to_the_dtypes_precision(mode):
    random = np.random.default_rng(4)
    for dtype, precision in ((np.float16, 1e-3), (np.float32, 2e-7), (np.float64, 4e-16), (np.complex64, 3e-7),
                             (np.complex128, 1e-15)):
        x = numbers(random, (300, 401), dtype)
        out = run(mode, ops.exp, Tensor(x)).asnumpy()
        assert out.dtype == dtype
        np.testing.assert_allclose(out, np.exp(x.astype(np.complex128 if dtype in COMPLEX else np.float64)), precision)
    wide = np.linspace(-87.3, 88.7, 100_003).astype(np.float32)
    np.testing.assert_allclose(run(mode, ops.exp, Tensor(wide)).asnumpy(), np.exp(wide.astype(np.float64)), 2e-7)
    x = rounded(wide[wide > -87])  # numbers below the smallest normal one are 0
    np.testing.assert_allclose(as_float32(run(mode, ops.exp, Tensor(x, ms.bfloat16))), np.exp(x.astype(np.float64)),
                               2**-8)
    special = np.array([0, -0.0, np.inf, -np.inf, np.nan, 89, -200], np.float32)
    assert np.array_equal(run(mode, ops.exp, Tensor(special)).asnumpy(), [1, 1, np.inf, 0, np.nan, np.inf, 0],
                          equal_nan=True)
    assert run(mode, ops.exp, Tensor(np.zeros((0, 3), np.float32))).shape == (0, 3)
    out = run(mode, ops.exp, Tensor(np.arange(4)))
    assert out.dtype == ms.float32
    np.testing.assert_allclose(out.asnumpy(), np.exp(np.arange(4.0)), 2e-7)


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_logarithms_are_those_of_float64_to_the_dtypes_precision(mode):
    random = np.random.default_rng(5)
    for dtype, precision in ((np.float16, 1e-3), (np.float32, 2e-7), (np.float64, 4e-16), (np.complex64, 3e-7),
                             (np.complex128, 1e-15)):
        x = numbers(random, (300, 401), dtype)
        x = x if dtype in COMPLEX else np.exp(x)
        out = run(mode, ops.log, Tensor(x)).asnumpy()
        assert out.dtype == dtype
        np.testing.assert_allclose(out, np.log(x.astype(np.complex128 if dtype in COMPLEX else np.float64)), precision,
                                   precision * (dtype in COMPLEX))
    wide = np.concatenate([np.geomspace(1.2e-38, 3e38, 100_003), np.linspace(0.999, 1.001, 10_001)]).astype(np.float32)
    np.testing.assert_allclose(run(mode, ops.log, Tensor(wide)).asnumpy(), np.log(wide.astype(np.float64)), 2e-7)
    x = rounded(np.geomspace(1e-37, 1e38, 1001).astype(np.float32))
    np.testing.assert_allclose(as_float32(run(mode, ops.log, Tensor(x, ms.bfloat16))), np.log(x.astype(np.float64)),
                               2**-8)
    special = np.array([0, -0.0, np.inf, -1, np.nan, 1], np.float32)
    assert np.array_equal(run(mode, ops.log, Tensor(special)).asnumpy(), [-np.inf, -np.inf, np.inf, np.nan, np.nan, 0],
                          equal_nan=True)
    out = run(mode, ops.log, Tensor(np.arange(1, 5)))
    assert out.dtype == ms.float32
    np.testing.assert_allclose(out.asnumpy(), np.log(np.arange(1.0, 5)), 2e-7)


def test_the_gradient_of_exponentials_is_themselves():
    x = Tensor(np.linspace(-5, 5, 33).astype(np.float32))
    assert np.array_equal(ms.grad(ops.exp)(x).asnumpy(), ops.exp(x).asnumpy())


def test_casts_between_all_dtypes_are_numpys():
    random = np.random.default_rng(3)
    for source in (np.bool_, *INTEGERS, *FLOATS):
        array = np.abs(numbers(random, (3, 7), source))
        for target in (np.bool_, *INTEGERS, *FLOATS):
            out = Tensor(array).astype(getattr(ms, np.dtype(target).name if target != np.bool_ else "bool_")).asnumpy()
            assert out.dtype == target and np.array_equal(out, array.astype(target))
        assert np.array_equal(as_float32(Tensor(array).astype(ms.bfloat16)), rounded(array.astype(np.float32)))


def test_casts_round_to_nearest_even_and_keep_the_special_values():
    values = np.array([0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 65519, 65520, 1e-7, 6e-8, 2.9e-8, 6.1e-5, -1e-5, 3e38, np.inf,
                       -np.inf, np.nan, 1e-40], np.float32)
    with np.errstate(over="ignore"):
        halves = values.astype(np.float16)
    out = Tensor(values).astype(ms.float16).asnumpy()
    assert np.array_equal(out.view(np.uint16)[:14], halves.view(np.uint16)[:14]) and np.isnan(out[14])
    assert np.array_equal(Tensor(halves).astype(ms.float32).asnumpy(), halves.astype(np.float32), equal_nan=True)
    values = values[:-1]  # AVX512-BF16 takes numbers below 1.2e-38 for 0
    assert np.array_equal(as_float32(Tensor(values).astype(ms.bfloat16)), rounded(values), equal_nan=True)


def test_every_float16_survives_float32():
    bits = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    halves = bits.view(np.float16)
    wide = Tensor(halves).astype(ms.float32)
    assert np.array_equal(wide.asnumpy(), halves.astype(np.float32), equal_nan=True)
    back = wide.astype(ms.float16).asnumpy()
    assert np.array_equal(back.view(np.uint16)[~np.isnan(halves)], bits[~np.isnan(halves)])


@few
@given(shape=st.lists(st.integers(1, 6), min_size=1, max_size=5), seed=st.integers(0, 999),
       dtype=st.sampled_from([np.bool_, np.int16, np.float32, np.int64, np.complex128]))
def test_any_order_of_axes_is_numpys(shape, seed, dtype):
    random = np.random.default_rng(seed)
    axes = tuple(int(axis) for axis in random.permutation(len(shape)))
    x = numbers(random, shape, dtype)

    def turned(x):
        return ops.transpose(x, axes)

    out = ms.jit(turned)(Tensor(x)).asnumpy() if seed % 5 == 0 else gen_ops_prim.transpose_op(Tensor(x), axes).asnumpy()
    assert np.array_equal(out, x.transpose(axes))


def heads_first(x):
    return ops.transpose(x, (0, 2, 1, 3))


def matrix(x):
    return ops.transpose(x, (0, 1, 3, 2))


@pytest.mark.parametrize("dtype", [ms.float32, ms.bfloat16, ms.float16, ms.int8])
def test_large_transposes_are_right_at_every_element(dtype):
    x = np.random.default_rng(4).integers(-99, 99, (2, 37, 6, 70)).astype(np.float32)
    for function, axes in ((heads_first, (0, 2, 1, 3)), (matrix, (0, 1, 3, 2))):
        assert np.array_equal(as_float32(ms.jit(function)(Tensor(x).astype(dtype))), x.transpose(axes))


def reshaped(x):
    return ops.expand_dims((x + x).reshape(4, -1), 1) + x.reshape(4, 1, -1)


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("dtype", [ms.float32, ms.bfloat16])
def test_shapes_change_and_elements_stay(mode, dtype):
    x = np.arange(24).reshape(2, 3, 4).astype(np.float32)
    assert np.array_equal(as_float32(run(mode, reshaped, Tensor(x, dtype))), 3 * x.reshape(4, 1, 6))


def outer(x, y):
    return ops.outer(x, y)


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_outer_is_numpys(mode):
    x, y = np.arange(5, dtype=np.float32), np.linspace(-1, 1, 7).astype(np.float32)
    assert np.array_equal(run(mode, outer, Tensor(x), Tensor(y)).asnumpy(), np.outer(x, y))


def gather_rows(table, indices):
    return ops.gather(table, indices, 0)


def gather_columns(table, indices):
    return ops.gather(table, indices, -1)


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_gather_takes_rows_or_columns_of_every_dtype(mode):
    random = np.random.default_rng(5)
    for dtype in (np.bool_, *INTEGERS, *FLOATS, *COMPLEX):
        table = numbers(random, (6, 5, 4), dtype)
        for indices in (np.array([[3, 0], [-1, 3]], np.int32), np.zeros((0,), np.int64), np.array(2, np.int16)):
            for function, axis in ((gather_rows, 0), (gather_columns, 2)):
                assert np.array_equal(run(mode, function, Tensor(table), Tensor(indices)).asnumpy(),
                                      table.take(indices, axis))
    table = rounded(random.normal(0, 1, (6, 5)).astype(np.float32))
    out = run(mode, gather_rows, Tensor(table, ms.bfloat16), Tensor(np.array([5, 1], np.int32)))
    assert out.dtype == ms.bfloat16 and np.array_equal(as_float32(out), table[[5, 1]])


def test_gather_inside_batches_is_numpys():
    random = np.random.default_rng(6)
    table, indices = random.normal(0, 1, (3, 4, 5, 2)).astype(np.float32), random.integers(0, 5, (3, 6))
    out = ops.gather(Tensor(table), Tensor(indices), 2, batch_dims=1).asnumpy()
    assert np.array_equal(out, np.stack([table[b].take(indices[b], 1) for b in range(3)]))


def test_an_index_out_of_range_is_named():
    table = Tensor(np.ones((4, 3), np.float32))
    for index in (4, -5):
        with pytest.raises(RuntimeError, match=rf"Gather on CPU: an index is {index}: expected one in \[-4, 4\)"):
            ops.gather(table, Tensor(np.array([0, index], np.int32)), 0).asnumpy()


def embedding_gradient(table, indices, direction):
    return ms.grad(lambda t, i, d: (ops.cast(ops.gather(t, i, 0), ms.float32) * d).sum(), 0)(table, indices, direction)


@few
@given(num_rows=st.integers(1, 40), size=st.integers(1, 40), count=st.integers(1, 60), in_bfloat16=st.booleans(),
       seed=st.integers(0, 99))
def test_the_gradient_of_rows_is_their_sum_by_index(num_rows, size, count, in_bfloat16, seed):
    random = np.random.default_rng(seed)
    table, indices = np.zeros((num_rows, size), np.float32), random.integers(0, num_rows, (1, count)).astype(np.int32)
    direction = random.normal(0, 1, (1, count, size)).astype(np.float32)
    if in_bfloat16:
        direction = rounded(direction)
    expected = np.zeros(table.shape)
    np.add.at(expected, indices, direction.astype(np.float64))
    out = embedding_gradient(Tensor(table, ms.bfloat16 if in_bfloat16 else ms.float32), Tensor(indices),
                             Tensor(direction))
    # Up to 60 terms below 5 in float32; then rounded to 8 bits.
    np.testing.assert_allclose(as_float32(out), expected, rtol=2**-8 if in_bfloat16 else 1e-6, atol=3e-5)


def test_sums_by_index_leave_out_negative_ones_and_refuse_those_that_are_too_large():
    x = np.arange(6).reshape(3, 2)
    out = ops.unsorted_segment_sum(Tensor(x), Tensor(np.array([1, -1, 1], np.int32)), 3)
    assert np.array_equal(out.asnumpy(), [[0, 0], [4, 6], [0, 0]])
    with pytest.raises(RuntimeError, match="UnsortedSegmentSum on CPU: an index is 3: expected less than 3"):
        ops.unsorted_segment_sum(Tensor(x), Tensor(np.array([1, 3, 1], np.int32)), 3).asnumpy()


def test_sums_by_index_do_not_depend_on_the_number_of_threads(cpu_library):
    random = np.random.default_rng(7)
    x = Tensor(random.normal(0, 1, (3000, 40)).astype(np.float32))
    indices = Tensor(random.integers(0, 50, 3000).astype(np.int32))
    outs = []
    for threads in (1, 2, 3, 5):
        cpu_library.pangu_set_num_threads(threads)
        outs.append(ops.unsorted_segment_sum(x, indices, 2000).asnumpy())
    cpu_library.pangu_set_num_threads(2)
    assert all(np.array_equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize(("padding", "by_frequency"), [(None, False), (2, False), (-1, True)])
def test_embedding_gradient_is_torchs(mode, padding, by_frequency):
    random = np.random.default_rng(8)
    table, indices = random.normal(0, 1, (9, 5)).astype(np.float32), random.integers(0, 9, (4, 6))
    direction = random.normal(0, 1, (4, 6, 5)).astype(np.float32)

    def loss(table, indices, direction):
        rows = ops.embedding(indices, table, padding_idx=padding, scale_grad_by_freq=by_frequency)
        return (rows * direction).sum()

    gradient_of = ms.grad(loss, 0)

    def gradient(table, indices, direction):
        return gradient_of(table, indices, direction)

    out = run(mode, gradient, Tensor(table), Tensor(indices), Tensor(direction)).asnumpy()
    weight = torch.tensor(table, requires_grad=True)
    rows = torch.nn.functional.embedding(torch.tensor(indices), weight, padding_idx=padding,
                                         scale_grad_by_freq=by_frequency)
    (rows * torch.tensor(direction)).sum().backward()
    np.testing.assert_allclose(out, weight.grad.numpy(), rtol=1e-6, atol=1e-6)
