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

from . import ascendc, kernels
from .arguments import expect_at_least, expect_shape, expect_type, known_values
from .kernels import is_ascendc, is_native

# What flash_attention_score takes on 910B: multiples of 16 up to 512 as head size, and documents.
_FLASH_MULTIPLE, _FLASH_HEAD_DIM, _FLASH_DOCUMENTS = 16, 512, 1024
# What the AscendC operators take; the group is that of decoding.
_OPERATOR_HEAD_DIMS, _OPERATOR_GROUP = (64, 128), 16
_MASKED = -1e30  # finite, so that exp gives exactly 0 without inf - inf


def attention(q_TNH, k_TMH, v_TMH, cu_seqlens_C, row_len):
    """Causal grouped-query attention inside each document; scale 1/sqrt(H), softmax in float32. Returns [T, N, H].

    cu_seqlens_C: int64, cumulative document ends: 0 first, T last, padded by repeating T.
    row_len: T is a multiple of it and no document crosses a multiple of it (a Python int).
    Raises ValueError for shapes, types and, where they are known, lengths that do not fit.
    """
    _check_packed((q_TNH.shape, k_TMH.shape, v_TMH.shape, cu_seqlens_C.shape),
                  (q_TNH.dtype, k_TMH.dtype, v_TMH.dtype, cu_seqlens_C.dtype), cu_seqlens_C)
    num_tokens, num_heads, head_dim = q_TNH.shape
    scale = 1.0 / math.sqrt(head_dim)
    if _is_flash(head_dim, cu_seqlens_C.shape[0]):
        ends = cu_seqlens_C[1:]
        return ops.flash_attention_score(q_TNH, k_TMH, v_TMH, num_heads, attn_mask=_triangle(), scalar_value=scale,
                                         actual_seq_qlen=ends, actual_seq_kvlen=ends, input_layout="TND", sparse_mode=3)
    if is_ascendc("attention"):
        out, _ = packed_attention(ascendc.as_operand(q_TNH), ascendc.as_operand(k_TMH), ascendc.as_operand(v_TMH),
                                  cu_seqlens_C, scale)
        return ops.cast(out, q_TNH.dtype)
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


def packed_attention(q_TNH, k_TMH, v_TMH, cu_seqlens_C, scale):
    """Causal attention inside each document by the AscendC operator, for which the process must have it.

    q_TNH, k_TMH, v_TMH: float16 or bfloat16 (on 310B float16), H 64 or 128; cu_seqlens_C as in attention, any number of
    documents. Returns out_TNH and lse_NT, the float32 logarithm of each softmax's sum, which carries no gradient.
    Raises ValueError for what attention refuses, and for what the operator does not take.
    """
    _check_packed((q_TNH.shape, k_TMH.shape, v_TMH.shape, cu_seqlens_C.shape),
                  (q_TNH.dtype, k_TMH.dtype, v_TMH.dtype, cu_seqlens_C.dtype), cu_seqlens_C)
    _check_operand("packed_attention", q_TNH.dtype, q_TNH.shape[2], scale)
    return _packed_operator()(q_TNH, k_TMH, v_TMH, cu_seqlens_C, scale)


@constexpr
def _packed_operator():
    return ascendc.custom("PanguPackedAttention", out_shape=_packed_shapes, out_dtype=_packed_dtypes,
                          bprop=_packed_bprop)


@constexpr
def _packed_grad_operator():
    return ascendc.custom("PanguPackedAttentionGrad", out_shape=_qkv, out_dtype=_qkv)


def _packed_shapes(q, k, v, cu_seqlens, scale):
    return q, [q[1], q[0]]


def _packed_dtypes(q, k, v, cu_seqlens, scale):
    return q, ms.float32


def _qkv(q, k, v, *rest):
    return q, k, v


def _packed_bprop(q, k, v, cu_seqlens, scale, out, dout):
    dq, dk, dv = _packed_grad_operator()(q, k, v, out[0], dout[0], out[1], cu_seqlens, scale)
    return dq, dk, dv, ops.zeros_like(cu_seqlens), 0.0


@constexpr(check=False)
def _is_flash(head_dim, num_lengths):
    """Whether flash_attention_score serves this call. Raises ValueError where nothing does."""
    if not is_native("attention"):
        return False
    if kernels.device() == "CPU":
        return True  # our kernel for it takes everything
    if head_dim % _FLASH_MULTIPLE or head_dim > _FLASH_HEAD_DIM:
        raise ValueError(f"attention: q has head size {head_dim}, flash_attention_score takes multiples of "
                         f"{_FLASH_MULTIPLE} up to {_FLASH_HEAD_DIM}; use run.reference_ops=[attention].")
    fits = num_lengths is None or num_lengths - 1 <= _FLASH_DOCUMENTS
    if not fits and not is_ascendc("attention"):
        raise ValueError(f"attention: cu_seqlens_C has {num_lengths - 1} documents, flash_attention_score takes at "
                         f"most {_FLASH_DOCUMENTS}: use fewer rows (train.micro_batch_rows), or the operator of "
                         f"ascend_kernels: {kernels.ascendc().missing}.")
    return fits


def _check_heads(op, shapes, dtypes, legends):
    """q and k; shapes: [..., heads, head size]."""
    expect_type(op, "q", dtypes[0], "float32", "bfloat16", "float16")
    name = str(dtypes[0]).lower()
    expect_type(op, "k", dtypes[1], name)
    expect_type(op, "v", dtypes[2], name)
    expect_shape(op, "q", shapes[0], (None, None, None), legends[0])
    expect_shape(op, "k", shapes[1], (shapes[0][0], None, shapes[0][2]), legends[1])
    expect_shape(op, "v", shapes[2], shapes[1], legends[1])
    num_heads, num_kv_heads = shapes[0][1], shapes[1][1]
    if None not in (num_heads, num_kv_heads) and (num_kv_heads < 1 or num_heads % num_kv_heads):
        raise ValueError(f"{op}: q has {num_heads} heads, expected a multiple of k's, {num_kv_heads}.")


@constexpr(check=False)
def _check_packed(shapes, dtypes, cu_seqlens):
    op = "attention"
    _check_heads(op, shapes, dtypes, ("tokens, heads and head size", "tokens, key/value heads and head size"))
    expect_at_least(op, "q", shapes[0][0], 1, "tokens")
    expect_type(op, "cu_seqlens_C", dtypes[3], "int64")
    expect_shape(op, "cu_seqlens_C", shapes[3], (None,), "cumulative lengths")
    expect_at_least(op, "cu_seqlens_C", shapes[3][0], 2, "lengths")
    lengths = known_values(cu_seqlens)
    if lengths is None:
        return
    if lengths[0] != 0 or lengths[-1] != shapes[0][0]:
        raise ValueError(f"{op}: cu_seqlens_C goes from {lengths[0]} to {lengths[-1]}, expected 0 first and the number "
                         f"of tokens last, {shapes[0][0]}.")
    falling = np.flatnonzero(np.diff(lengths) < 0)
    if falling.size:
        raise ValueError(f"{op}: cu_seqlens_C falls from {lengths[falling[0]]} to {lengths[falling[0] + 1]} at place "
                         f"{falling[0] + 1}, expected lengths that never fall.")


@constexpr
def _check_operand(op, dtype, head_dim, scale):
    expect_type(op, "q", dtype, *(("float16",) if kernels.ascendc().chip == "ascend310b" else ("float16", "bfloat16")))
    if head_dim not in _OPERATOR_HEAD_DIMS:
        raise ValueError(f"{op}: q has head size {head_dim}, expected one of {_OPERATOR_HEAD_DIMS} for the AscendC "
                         "operator; use another model.head_dim or run.reference_ops=[attention].")
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"{op}: scale is {scale}, expected a positive number.")


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
    if is_native("decode_attention"):
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


def decode_attention(q_BNH, k_BMH, v_BMH, k_cache_BMSH, v_cache_BMSH, positions_B):
    """Write each sequence's new key and value at positions_B (int32) and attend over positions 0 .. positions_B[b].

    k_cache_BMSH, v_cache_BMSH: Parameters, updated in place; the next reader has to depend on the result, [B, N, H].
    Scale 1/sqrt(H), softmax in float32. Raises ValueError for shapes, types and, where they are known, positions that
    do not fit.
    """
    _check_decode((q_BNH.shape, k_BMH.shape, v_BMH.shape, k_cache_BMSH.shape, v_cache_BMSH.shape, positions_B.shape),
                  (q_BNH.dtype, k_BMH.dtype, v_BMH.dtype, k_cache_BMSH.dtype, v_cache_BMSH.dtype, positions_B.dtype),
                  positions_B)
    batch, num_kv_heads, cache_len, head_dim = k_cache_BMSH.shape
    if is_ascendc("decode_attention"):
        return _decode_by_operator(q_BNH, k_BMH, v_BMH, k_cache_BMSH, v_cache_BMSH, positions_B)
    positions = ops.broadcast_to(ops.cast(positions_B, ms.int64).reshape(batch, 1, 1), (batch, num_kv_heads, 1))
    index_B3 = ops.concat((_slots(batch, num_kv_heads), positions.reshape(-1, 1)), 1)
    caches = ()
    for cache, new in ((k_cache_BMSH, k_BMH), (v_cache_BMSH, v_BMH)):
        written = ops.scatter_nd_update(cache, index_B3, new.reshape(-1, head_dim))
        caches = caches + (written.reshape(batch * num_kv_heads, cache_len, head_dim),)
    return cached_attention(q_BNH, caches[0], caches[1], positions_B)


def _decode_by_operator(q_BNH, k_BMH, v_BMH, k_cache_BMSH, v_cache_BMSH, positions_B):
    scale = 1.0 / math.sqrt(q_BNH.shape[2])
    q = ascendc.as_operand(q_BNH)
    _check_operand("decode_attention", q.dtype, q_BNH.shape[2], scale)
    _check_group(q_BNH.shape[1] // k_BMH.shape[1])
    outputs = _decode_operator()(q, ascendc.as_operand(k_BMH), ascendc.as_operand(v_BMH),
                                 ascendc.as_operand(k_cache_BMSH), ascendc.as_operand(v_cache_BMSH), positions_B, scale)
    if not _is_on_host():
        return outputs
    # MindSpore hands a function on the host copies of the caches.
    out, k_cache, v_cache = outputs
    written = (ops.assign(k_cache_BMSH, ops.cast(k_cache, k_cache_BMSH.dtype)),
               ops.assign(v_cache_BMSH, ops.cast(v_cache, v_cache_BMSH.dtype)))
    return ops.depend(ops.cast(out, q_BNH.dtype), written)


@constexpr
def _check_group(group):
    if group > _OPERATOR_GROUP:
        raise ValueError(f"decode_attention: q has {group} heads per key/value head, expected at most "
                         f"{_OPERATOR_GROUP} for the AscendC operator; use run.reference_ops=[decode_attention].")


@constexpr
def _slots(batch, num_kv_heads):
    """Sequence and head of every row of keys, int64 [B M, 2]."""
    return Tensor(np.stack(np.divmod(np.arange(batch * num_kv_heads), num_kv_heads), 1))


@constexpr
def _is_on_host():
    return kernels.ascendc().run is not None


@constexpr
def _decode_operator():
    host = kernels.ascendc().run is not None
    return ascendc.custom("PanguDecodeAttention", out_shape=_out_and_caches if host else _first,
                          out_dtype=_out_and_caches if host else _first)


def _out_and_caches(q, k, v, k_cache, v_cache, positions, scale):
    return q, k_cache, v_cache


@constexpr(check=False)
def _check_decode(shapes, dtypes, positions):
    op = "decode_attention"
    _check_heads(op, shapes, dtypes, ("sequences, heads and head size", "sequences, key/value heads and head size"))
    (batch, num_kv_heads, head_dim), cache_shape = shapes[1], shapes[3]
    for place, name in ((3, "k_cache_BMSH"), (4, "v_cache_BMSH")):
        expect_type(op, name, dtypes[place], str(dtypes[0]).lower())
        expect_shape(op, name, shapes[place], (batch, num_kv_heads, None if place == 3 else cache_shape[2], head_dim),
                     "sequences, key/value heads, positions and head size")
    expect_type(op, "positions_B", dtypes[5], "int32")
    expect_shape(op, "positions_B", shapes[5], (batch,), "a position per sequence")
    values = known_values(positions)
    if values is not None and not ((values >= 0) & (values < cache_shape[2])).all():
        raise ValueError(f"{op}: positions_B has {values.min()} to {values.max()}, expected 0 to {cache_shape[2] - 1}, "
                         "the cache's last.")
