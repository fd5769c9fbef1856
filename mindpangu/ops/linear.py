"""Affine map of the projections: one kernel forward, one for all three gradients.

T tokens, K inputs, N outputs.
"""

from mindspore import ops
from mindspore.ops.primitive import constexpr

from . import kernels
from .kernels import is_native


def linear(x_TK, weight_NK, bias_N=None):
    """x @ weight^T + bias [T, N], in x's dtype; sums in float32 on a CPU.

    Weight and bias may be float32 or bfloat16 whatever x is: operands of the products are rounded to bfloat16 where
    x or the weight is, so that a float32 x with bfloat16 weights reads half the memory.
    """
    if is_native("linear"):
        if bias_N is None:
            return _linear_kernel()(x_TK, weight_NK)
        return _linear_bias_kernel()(x_TK, weight_NK, bias_N)
    y = ops.MatMul(transpose_b=True)(x_TK, ops.cast(weight_NK, x_TK.dtype))
    if bias_N is not None:
        y = y + ops.cast(bias_N, x_TK.dtype)
    return y


@constexpr
def _linear_kernel():
    return kernels.custom("Linear", out_shape=_shape, out_dtype=_dtype, bprop=_linear_bprop)


@constexpr
def _linear_bias_kernel():
    return kernels.custom("LinearBias", out_shape=_shape, out_dtype=_dtype, bprop=_linear_bias_bprop)


@constexpr
def _linear_grad_kernel():
    return kernels.custom("LinearGrad", out_shape=_inputs, out_dtype=_inputs)


@constexpr
def _linear_bias_grad_kernel():
    return kernels.custom("LinearBiasGrad", out_shape=_inputs, out_dtype=_inputs)


def _shape(x, weight, *bias):
    return [*x[:-1], weight[0]]


def _dtype(x, *weight_and_bias):
    return x


def _inputs(dy, *x_weight_and_bias):
    return x_weight_and_bias


def _linear_bprop(x, weight, out, dout):
    return _linear_grad_kernel()(dout, x, weight)


def _linear_bias_bprop(x, weight, bias, out, dout):
    return _linear_bias_grad_kernel()(dout, x, weight, bias)
