"""The library beside MindSpore's own kernels: views, errors, products."""

import subprocess
import sys

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor, mint, ops

pytestmark = pytest.mark.usefixtures("mindspore_cpu")


def _views(x):
    return x.transpose(1, 0, 2), x[:, 2:], ops.split(x, (2, 1, 1), 1)[1], x[..., 4:], mint.narrow(x, 0, 1, 3)


def _sums(x):
    """Ops that the library does not serve, on views, summed."""
    total = ops.zeros((), ms.float32)
    for view in _views(x):
        total = total + (ops.exp(view) * ops.arange(view.shape[-1]) + ops.softmax(view, -1) * view.sum(0)).sum()
        total = total + ops.concat((view, view), -1).reshape(2, -1)[0].sum()
    return total


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_mindspores_own_ops_see_views_in_the_right_order_gradients_included(mode):
    array = np.random.default_rng(0).standard_normal((6, 4, 8)).astype(np.float32)
    value_and_grad = ms.value_and_grad(_sums, 0)

    def run(x):
        return value_and_grad(x)

    value, gradient = (ms.jit(run) if mode == "graph" else run)(Tensor(array))
    x = torch.tensor(array, dtype=torch.float64, requires_grad=True)
    total = 0
    for view in (x.transpose(0, 1), x[:, 2:], x[:, 2:3], x[..., 4:], x[1:4]):
        total = total + (view.exp() * torch.arange(view.shape[-1]) + view.softmax(-1) * view.sum(0)).sum()
        total = total + torch.cat((view, view), -1).reshape(2, -1)[0].sum()
    total.backward()
    np.testing.assert_allclose(value.asnumpy(), total.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient.asnumpy(), x.grad.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_a_wrong_dtype_names_op_argument_and_expectation(mode):
    product = ops.MatMul()

    def run(x):
        return product(x, x)

    with pytest.raises(RuntimeError, match="MatMul on CPU: the first operand is float64: expected float32, bfloat16"):
        (ms.jit(run) if mode == "graph" else run)(Tensor(np.eye(3))).asnumpy()


def _rounded(array, dtype):
    """float64 of the values that a tensor of this dtype holds."""
    return Tensor(array, dtype).astype(ms.float32).asnumpy().astype(np.float64)


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("dtype", [ms.float32, ms.bfloat16, ms.float16])
@pytest.mark.parametrize("transposed", [(False, False), (False, True), (True, False), (True, True)])
def test_products_are_those_of_float64(mode, dtype, transposed):
    random = np.random.default_rng(1)
    for batch, m, n, k in [((), 1, 1, 1), ((), 5, 129, 70), ((), 33, 40, 1100), ((), 97, 3, 0), ((), 0, 4, 5),
                           ((2, 3), 17, 31, 65), ((4,), 1, 300, 40), ((0,), 3, 4, 5)]:
        if dtype == ms.bfloat16 and 0 in (m, k, *batch):
            continue  # MindSpore cannot make an empty bfloat16 tensor from NumPy
        a = random.standard_normal((*batch, *((k, m) if transposed[0] else (m, k)))).astype(np.float32)
        b = random.standard_normal((*batch, *((n, k) if transposed[1] else (k, n)))).astype(np.float32)
        product = (ops.BatchMatMul if batch else ops.MatMul)(*transposed)

        def run(x, y, product=product):
            return product(x, y)

        out = (ms.jit(run) if mode == "graph" else run)(Tensor(a, dtype), Tensor(b, dtype))
        a64, b64 = _rounded(a, dtype), _rounded(b, dtype)
        a64, b64 = (x.swapaxes(-1, -2) if swap else x for x, swap in zip((a64, b64), transposed, strict=True))
        # Rounding of float32 sums of k products; bfloat16 rounds the result to 8 bits, float16 to 11.
        rounding = {ms.float32: 0, ms.bfloat16: 2**-8, ms.float16: 2**-11}[dtype]
        bound = 1e-6 * (np.abs(a64) @ np.abs(b64)) + rounding * np.abs(a64 @ b64) + 1e-30
        assert out.shape == (a64 @ b64).shape and out.dtype == dtype
        assert (np.abs(out.astype(ms.float32).asnumpy() - a64 @ b64) <= bound).all()


def test_products_do_not_depend_on_the_number_of_threads(cpu_library):
    random = np.random.default_rng(2)
    a, b = (Tensor(random.standard_normal(shape).astype(np.float32)) for shape in ((300, 700), (700, 510)))
    outs = []
    for rounded in (0, 1):
        cpu_library.pangu_set_bf16_products(rounded)
        for threads in (1, 2, 3, 7):
            cpu_library.pangu_set_num_threads(threads)
            outs.append(ops.MatMul()(a, b).asnumpy())
    cpu_library.pangu_set_bf16_products(0)
    cpu_library.pangu_set_num_threads(2)
    for group in (outs[:4], outs[4:]):
        assert all(np.array_equal(out, group[0]) for out in group)
    # Rounding both operands to 8 bits moves a sum of 700 products by about sqrt(700) * 2^-8.
    assert 0 < np.abs(outs[0] - outs[4]).max() < 1


def test_a_library_that_comes_after_mindspores_first_op_is_refused():
    code = ("import numpy as np, mindspore as ms; ms.set_device('CPU'); x = ms.Tensor(np.ones((2, 3), np.float32)); "
            "ms.ops.MatMul()(x.T + 1, x).asnumpy(); from mindpangu.ops.cpu import build; build.load(build.build(), 2)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and "has to come before MindSpore's first op" in done.stderr
