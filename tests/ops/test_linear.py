"""The affine map against float64 and torch's gradients in double precision."""

import mindspore as ms
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mindspore import Tensor

from mindpangu.ops.linear import linear

pytestmark = pytest.mark.usefixtures("kernel")


def run(mode, arrays, direction, dtypes):
    """Value and the gradients of sum(value * direction) by x, weight and, where there is one, bias."""

    def loss(*tensors):
        out = linear(*tensors[1:])
        return (ms.ops.cast(out, ms.float32) * tensors[0]).sum(), out

    value_and_grad = ms.value_and_grad(loss, tuple(range(1, 1 + len(arrays))), has_aux=True)

    def both(*tensors):
        return value_and_grad(*tensors)

    tensors = [Tensor(array, dtype) for array, dtype in zip(arrays, dtypes, strict=True)]
    (_, out), gradients = (ms.jit(both) if mode == "graph" else both)(Tensor(direction), *tensors)
    assert [out.dtype, *(gradient.dtype for gradient in gradients)] == [dtypes[0], *dtypes]
    return [tensor.astype(ms.float32).asnumpy() for tensor in (out, *gradients)]


def expected(arrays, direction):
    """The same in float64, and the sums of magnitudes that bound the rounding of each."""
    x, weight, *bias = (torch.tensor(array, dtype=torch.float64, requires_grad=True) for array in arrays)
    out = x @ weight.T + (bias[0] if bias else 0)
    (out * torch.tensor(direction)).sum().backward()
    magnitudes = [np.abs(array).astype(np.float64) for array in (*arrays[:2], direction)]
    bounds = [magnitudes[0] @ magnitudes[1].T, magnitudes[2] @ magnitudes[1], magnitudes[2].T @ magnitudes[0]]
    if bias:
        bounds[0] = bounds[0] + np.abs(arrays[2])
        bounds.append(magnitudes[2].sum(0))
    return [tensor.detach().numpy() for tensor in (out, x.grad, weight.grad, *(b.grad for b in bias))], bounds


def make(random, num_tokens, num_in, num_out, has_bias, dtypes):
    shapes = [(num_tokens, num_in), (num_out, num_in), (num_out,)][: 3 if has_bias else 2]
    arrays = [random.normal(0, 1, shape).astype(np.float32) for shape in (*shapes, (num_tokens, num_out))]
    for i, dtype in enumerate((*dtypes, dtypes[0])):
        if dtype == ms.bfloat16:
            arrays[i] = torch.tensor(arrays[i]).bfloat16().float().numpy()
    return arrays[:-1], arrays[-1]


def check(outputs, arrays, direction, tolerance):
    references, bounds = expected(arrays, direction)
    for output, reference, bound in zip(outputs, references, bounds, strict=True):
        assert output.shape == reference.shape and (np.abs(output - reference) <= tolerance * bound + 1e-30).all()


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("has_bias", [True, False])
def test_value_and_gradients_match_double_precision(mode, has_bias):
    dtypes = (ms.float32,) * (2 + has_bias)
    arrays, direction = make(np.random.default_rng(0), 70, 33, 95, has_bias, dtypes)
    check(run(mode, arrays, direction, dtypes), arrays, direction, 1e-6)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(num_tokens=st.integers(1, 150), num_in=st.integers(1, 100), num_out=st.integers(1, 100), has_bias=st.booleans(),
       seed=st.integers(0, 99))
def test_any_shape_matches_double_precision(num_tokens, num_in, num_out, has_bias, seed):
    dtypes = (ms.float32,) * (2 + has_bias)
    arrays, direction = make(np.random.default_rng(seed), num_tokens, num_in, num_out, has_bias, dtypes)
    check(run("eager", arrays, direction, dtypes), arrays, direction, 2e-6)


@pytest.mark.parametrize("num_tokens", [1, 5, 40])  # few rows take another way than many
@pytest.mark.parametrize("dtypes", [(ms.bfloat16,) * 3, (ms.float32, ms.bfloat16, ms.bfloat16),
                                    (ms.float32, ms.bfloat16, ms.float32), (ms.bfloat16, ms.float32, ms.float32)])
def test_bfloat16_weights_and_activations_mix(kernel, num_tokens, dtypes):
    if kernel == "reference":
        pytest.skip("the reference works in the activations' dtype, of which MindSpore's CPU backend sums no bfloat16")
    arrays, direction = make(np.random.default_rng(1), num_tokens, 64, 48, True, dtypes)
    # Both operands and a bfloat16 result are rounded to 8 bits: by 2^-8 at most, each.
    check(run("graph", arrays, direction, dtypes), arrays, direction, 3 * 2**-8)


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_no_tokens_give_no_tokens_and_zero_gradients(mode, kernel):
    if kernel == "reference":
        pytest.skip("MindSpore's gradient of a broadcast over no rows is an error")
    dtypes = (ms.float32,) * 3
    arrays, direction = make(np.random.default_rng(2), 0, 6, 5, True, dtypes)
    out, dx, dweight, dbias = run(mode, arrays, direction, dtypes)
    assert out.shape == (0, 5) and dx.shape == (0, 6) and not dweight.any() and not dbias.any()


def test_views_count_by_what_they_show():
    random = np.random.default_rng(3)
    x, weight, bias = (random.normal(0, 1, shape).astype(np.float32) for shape in ((20, 30), (7, 20), (7,)))
    transposed = linear(Tensor(x).T, Tensor(weight), Tensor(bias)).asnumpy()
    np.testing.assert_allclose(transposed, x.T @ weight.T + bias, rtol=1e-5, atol=1e-5)
    sliced = linear(Tensor(x)[:, 5:25], Tensor(weight), Tensor(bias)).asnumpy()
    np.testing.assert_allclose(sliced, x[:, 5:25] @ weight.T + bias, rtol=1e-5, atol=1e-5)


def test_gradients_do_not_depend_on_the_number_of_threads(cpu_library):
    dtypes = (ms.float32,) * 3
    arrays, direction = make(np.random.default_rng(4), 500, 130, 260, True, dtypes)
    runs = []
    for threads in (1, 2, 3):
        cpu_library.pangu_set_num_threads(threads)
        runs.append(run("eager", arrays, direction, dtypes))
    cpu_library.pangu_set_num_threads(2)
    for outputs in runs[1:]:
        assert all(np.array_equal(output, first) for output, first in zip(outputs, runs[0], strict=True))


def test_wrong_arguments_are_named(kernel):
    if kernel == "reference":
        pytest.skip("the reference takes what MindSpore's primitives take")
    weight = Tensor(np.ones((3, 8), np.float32))
    with pytest.raises(RuntimeError, match="Linear on CPU: x is float64: expected float32 or bfloat16"):
        linear(Tensor(np.ones((2, 8))), weight).asnumpy()
    with pytest.raises(RuntimeError, match=r"Linear on CPU: the weight is \[3, 8\]: expected \[out, 9\]"):
        linear(Tensor(np.ones((2, 9), np.float32)), weight).asnumpy()


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_float32_products_are_as_exact_as_numpys(scale, kernel):
    """Also where they are sums of bfloat16 products; numbers of very different sizes meet in a sum."""
    random = np.random.default_rng(1)
    x, weight = (random.standard_normal((n, 700)) * np.exp2(random.integers(-12, 12, (n, 700))) for n in (70, 90))
    x, weight = (x * scale).astype(np.float32), weight.astype(np.float32)
    exact = x.astype(np.float64) @ weight.T.astype(np.float64)
    ours, numpys = (np.abs(y - exact).max() for y in (linear(Tensor(x), Tensor(weight)).asnumpy(), x @ weight.T))
    assert ours < 2 * numpys
