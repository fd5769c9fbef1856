"""Root-mean-square normalisation (arXiv:1910.07467)."""

import mindspore as ms
from mindspore import ops

from .kernels import is_native


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, with statistics in float32.

    x [..., D], weight [D]; returns x's shape and dtype.
    """
    if is_native("rms_norm"):
        return ops.rms_norm(x, weight, eps)[0]
    x32 = ops.cast(x, ms.float32)
    scale = ops.rsqrt(ops.mean(ops.square(x32), -1, True) + eps)
    return ops.cast(x32 * scale, x.dtype) * weight
