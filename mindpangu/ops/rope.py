"""Rotary position embedding, rotate-half form (arXiv:2104.09864).

T tokens, N query heads, M key/value heads, H head size. `ops.rotary_position_embedding` is deprecated after MindSpore
2.9 and missing on CPU.
"""

import functools

import mindspore as ms
import numpy as np
from mindspore import ops
from mindspore.ops.primitive import constexpr

from . import kernels
from .kernels import is_native


def inverse_frequencies(head_dim, theta):
    """theta^(-2i/H) for i < H/2, float32: what the angle of one position step is, in radians."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return (1.0 / np.float32(theta) ** exponents).astype(np.float32)


def rope_tables(positions_T, inverse_frequencies_H2, dtype):
    """cos and sin [T, 1, H] of each position's angles; the angles are float32, the tables `dtype`."""
    angles = ops.expand_dims(ops.cast(positions_T, ms.float32), -1) * inverse_frequencies_H2
    angles = ops.expand_dims(ops.concat((angles, angles), -1), 1)
    return ops.cast(ops.cos(angles), dtype), ops.cast(ops.sin(angles), dtype)


def rope(x_TNH, cos_T1H, sin_T1H):
    """Rotate each pair (x[i], x[i + H/2]) by its position's angle. Returns [T, N, H].

    The tables are constants: they get no gradient.
    """
    if is_native("rope"):
        return _rope_kernel()(x_TNH, cos_T1H, sin_T1H)
    cos_T1H, sin_T1H = ops.stop_gradient(cos_T1H), ops.stop_gradient(sin_T1H)
    half = x_TNH.shape[-1] // 2
    rotated = ops.concat((-x_TNH[..., half:], x_TNH[..., :half]), -1)
    return x_TNH * cos_T1H + rotated * sin_T1H


def split_rope(qkv_TC, cos_T1H, sin_T1H, num_heads, num_kv_heads):
    """A token's projection q | k | v, C = (N + 2 M) H, taken apart: q [T, N, H] and k [T, M, H] rotated, v [T, M, H].

    num_heads, num_kv_heads: N and M, Python ints. The tables are constants: they get no gradient.
    """
    if is_native("rope"):
        return _split_rope_kernel(num_heads, num_kv_heads)(qkv_TC, cos_T1H, sin_T1H)
    heads = qkv_TC.reshape(qkv_TC.shape[0], num_heads + 2 * num_kv_heads, -1)
    q, k, v = ops.split(heads, (num_heads, num_kv_heads, num_kv_heads), 1)
    return rope(q, cos_T1H, sin_T1H), rope(k, cos_T1H, sin_T1H), v


@constexpr
def _rope_kernel():
    return kernels.custom("Rope", out_shape=_first, out_dtype=_first, bprop=_rope_bprop)


@constexpr
def _rope_grad_kernel():
    return kernels.custom("RopeGrad", out_shape=_first, out_dtype=_first)


@constexpr
def _split_rope_kernel(num_heads, num_kv_heads):
    kernel = kernels.custom("SplitRope", out_shape=_split_shape(num_heads, num_kv_heads), out_dtype=_split_dtype,
                            bprop=_split_rope_bprop)
    # MindSpore keeps inferred shapes by name, attributes and input shapes: without this, by the first pair of heads.
    kernel.add_prim_attr("heads", [num_heads, num_kv_heads])
    return kernel


@constexpr
def _split_rope_grad_kernel():
    return kernels.custom("SplitRopeGrad", out_shape=_joined_shape, out_dtype=_first)


def _first(x, *rest):
    return x


@functools.cache
def _split_shape(num_heads, num_kv_heads):
    def shape(qkv, cos, sin):
        head_dim = qkv[1] // (num_heads + 2 * num_kv_heads)
        return [qkv[0], num_heads, head_dim], [qkv[0], num_kv_heads, head_dim], [qkv[0], num_kv_heads, head_dim]

    return shape


def _split_dtype(qkv, cos, sin):
    return qkv, qkv, qkv


def _joined_shape(q, k, v, cos, sin):
    return [q[0], (q[1] + k[1] + v[1]) * q[2]]


def _rope_bprop(x, cos, sin, out, dout):
    return _rope_grad_kernel()(dout, cos, sin), ops.zeros_like(cos), ops.zeros_like(sin)


def _split_rope_bprop(qkv, cos, sin, out, dout):
    dqkv = _split_rope_grad_kernel()(dout[0], dout[1], dout[2], cos, sin)
    return dqkv, ops.zeros_like(cos), ops.zeros_like(sin)
