"""Causal attention over packed rows, and of one new token over a cache.

T tokens, N query heads, M key/value heads, G = N / M, H head size, C padded document count + 1, R rows, L row length,
B sequences, S cache length.
"""

import functools
import math

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops
from mindspore.ops.primitive import constexpr

from . import kernels
from .kernels import is_native

_MASKED = -1e30  # finite, so that exp gives exactly 0 without inf - inf


def attention(q_TNH, k_TMH, v_TMH, cu_seqlens_C, row_len):
    """Causal grouped-query attention inside each document; scale 1/sqrt(H), softmax in float32. Returns [T, N, H].

    cu_seqlens_C: int64, cumulative document ends: 0 first, T last, padded by repeating T.
    row_len: T is a multiple of it and no document crosses a multiple of it (a Python int).
    """
    num_tokens, num_heads, head_dim = q_TNH.shape
    scale = 1.0 / math.sqrt(head_dim)
    if is_native("attention"):
        ends = cu_seqlens_C[1:]
        return ops.flash_attention_score(q_TNH, k_TMH, v_TMH, num_heads, attn_mask=_triangle(), scalar_value=scale,
                                         actual_seq_qlen=ends, actual_seq_kvlen=ends, input_layout="TND", sparse_mode=3)
    num_kv_heads = k_TMH.shape[1]
    group = num_heads // num_kv_heads
    num_rows = num_tokens // row_len
    q = (q_TNH * scale).reshape(num_rows, row_len, num_kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    q = q.reshape(num_rows * num_kv_heads, group * row_len, head_dim)
    k = k_TMH.reshape(num_rows, row_len, num_kv_heads, head_dim).transpose(0, 2, 1, 3)
    v = v_TMH.reshape(num_rows, row_len, num_kv_heads, head_dim).transpose(0, 2, 1, 3)
    k = k.reshape(num_rows * num_kv_heads, row_len, head_dim)
    v = v.reshape(num_rows * num_kv_heads, row_len, head_dim)

    scores = ops.BatchMatMul(transpose_b=True)(q, k).reshape(num_rows, num_kv_heads, group, row_len, row_len)
    scores = ops.cast(scores, ms.float32) + _row_mask(cu_seqlens_C, num_rows, row_len)
    weights = ops.cast(ops.softmax(scores, -1), v.dtype).reshape(num_rows * num_kv_heads, group * row_len, row_len)
    out = ops.BatchMatMul()(weights, v).reshape(num_rows, num_kv_heads, group, row_len, head_dim)
    return out.transpose(0, 3, 1, 2, 4).reshape(num_tokens, num_heads, head_dim)


@constexpr
def _triangle():
    """What sparse_mode 3 (causal from the lower right) wants as its mask on Ascend; the CPU's kernel never reads it."""
    return _triangle_tensor()


@functools.cache
def _triangle_tensor():
    return Tensor(np.triu(np.ones((2048, 2048), np.uint8), 1))


def _row_mask(cu_seqlens_C, num_rows, row_len):
    """[R, 1, 1, L, L]: 0 where a position may look, -1e30 where it is later or in another document."""
    index = ops.arange(num_rows * row_len)
    document = ops.cast(ops.expand_dims(index, -1) >= ops.cast(cu_seqlens_C, index.dtype), ms.float32).sum(-1)
    document = document.reshape(num_rows, row_len)
    same = ops.cast(ops.expand_dims(document, 2) == ops.expand_dims(document, 1), ms.float32)
    row = ops.arange(row_len)
    causal = ops.cast(ops.expand_dims(row, 1) >= ops.expand_dims(row, 0), ms.float32)
    return ((1.0 - same * causal) * _MASKED).reshape(num_rows, 1, 1, row_len, row_len)


@constexpr
def _cached_attention_kernel():
    return kernels.custom("CachedAttention", out_shape=_first, out_dtype=_first)


def _first(q, *rest):
    return q


def cached_attention(q_BNH, k_cache_BMSH, v_cache_BMSH, positions_B):
    """Attention of one token per sequence over cache positions 0 .. positions_B[b]. Returns [B, N, H].

    k_cache_BMSH, v_cache_BMSH: [B * M, S, H], the token's own key and value already written.
    """
    if is_native("cached_attention"):
        return _cached_attention_kernel()(q_BNH, k_cache_BMSH, v_cache_BMSH, positions_B)
    batch, num_heads, head_dim = q_BNH.shape
    num_kv_heads = k_cache_BMSH.shape[0] // batch
    cache_len = k_cache_BMSH.shape[1]
    q = (q_BNH * (1.0 / math.sqrt(head_dim))).reshape(batch * num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = ops.BatchMatMul(transpose_b=True)(q, k_cache_BMSH).reshape(batch, num_heads, cache_len)
    later = ops.expand_dims(ops.arange(cache_len), 0) > ops.expand_dims(ops.cast(positions_B, ms.int64), 1)
    scores = ops.cast(scores, ms.float32) + ops.expand_dims(ops.cast(later, ms.float32), 1) * _MASKED
    weights = ops.cast(ops.softmax(scores, -1), v_cache_BMSH.dtype).reshape(batch * num_kv_heads, -1, cache_len)
    return ops.BatchMatMul()(weights, v_cache_BMSH).reshape(batch, num_heads, head_dim)
