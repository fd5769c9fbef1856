"""Rotary position embedding, rotate-half form (arXiv:2104.09864), composed from primitives.

T tokens, N heads, H head size. `ops.rotary_position_embedding` is deprecated after MindSpore 2.9 and missing on CPU.
"""

import mindspore as ms
import numpy as np
from mindspore import ops


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
    """Rotate each pair (x[i], x[i + H/2]) by its position's angle. Returns [T, N, H]."""
    half = x_TNH.shape[-1] // 2
    rotated = ops.concat((-x_TNH[..., half:], x_TNH[..., :half]), -1)
    return x_TNH * cos_T1H + rotated * sin_T1H
