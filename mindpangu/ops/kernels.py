"""Which kernel serves each op: chosen once per process by `select`, read by the ops when a graph is compiled."""

import functools
from collections.abc import Callable
from typing import NamedTuple

from mindspore import ops
from mindspore.ops.primitive import constexpr

OPS = ("adamw", "attention", "cross_entropy", "decode_attention", "head_loss", "linear", "rms_norm", "rope", "sample",
       "swiglu", "topk_kl")
# The ops that have a native kernel, by device. What is not listed is composed from primitives on every device.
NATIVE_OPS = {
    "CPU": OPS,
    "Ascend": ("attention", "rms_norm", "swiglu"),
    "ascend310b": (),  # a chip of Ascend for which CANN has none of these three
}
# The operators of ascend_kernels, by chip. Where a device has a native kernel too, that one is the default. Decoding's
# takes float16 alone, a 310B's type.
ASCENDC_OPS = {
    "ascend910b": {"attention": "PanguPackedAttention", "cross_entropy": "PanguTopkKl", "topk_kl": "PanguTopkKl"},
    "ascend310b": {"attention": "PanguPackedAttention", "cross_entropy": "PanguTopkKl",
                   "decode_attention": "PanguDecodeAttention", "topk_kl": "PanguTopkKl"},
}


class AscendC(NamedTuple):
    """How this process reaches the AscendC operators."""

    chip: str  # as MindSpore names it: ascend910b, ascend310b, ...
    run: Callable | None = None  # on the host: (OpType, arrays, attributes) -> arrays
    missing: str | None = None  # on a device: why its operators cannot be called and what to do; None: they can


_native_ops: set[str] = set()
_ascendc_ops: dict[str, str] = {}
_ascendc: AscendC | None = None
_operand_type = None
_library = None
_device = "CPU"


def select(kernels, reference_ops, device, library=None, ascendc=None, operand_type=None):
    """Choose the kernels of this process before the first graph is compiled.

    kernels: "native", "reference", or on a CPU "ascendc_host", where the AscendC operators' sources serve their ops and
    native kernels the others; reference_ops: names of ops that run on their reference all the same; library: path of
    the CPU library (see ops.cpu.build), which native kernels need on a CPU; ascendc: an AscendC; operand_type: the
    16-bit MindSpore type to which float32 operands of operators on the host are rounded; None: they stay.
    Returns {op: "native" | "ascendc" | "ascendc_host" | "reference"}. Raises ValueError for an unknown op.
    """
    unknown = sorted(set(reference_ops) - set(OPS))
    if unknown:
        raise ValueError(f"run.reference_ops={list(reference_ops)}: unknown {unknown}; the ops are {list(OPS)}.")
    global _device, _library, _ascendc, _operand_type
    _device, _library, _ascendc, _operand_type = device, library, ascendc, operand_type
    _native_ops.clear()
    _ascendc_ops.clear()
    if kernels != "reference":
        chip = ascendc.chip if ascendc else None
        _native_ops.update(NATIVE_OPS.get(chip if device == "Ascend" else device, NATIVE_OPS[device]))
        if ascendc and not ascendc.missing:
            _ascendc_ops.update(ASCENDC_OPS.get(chip, {}))
    if kernels == "ascendc_host":
        # The operators take logits: the head's loss has to come from its chunks.
        _native_ops.difference_update(_ascendc_ops, ["head_loss"])
    for op in reference_ops:
        _native_ops.discard(op)
        _ascendc_ops.pop(op, None)
    operators = "ascendc_host" if kernels == "ascendc_host" else "ascendc"
    return {op: "native" if op in _native_ops else operators if op in _ascendc_ops else "reference" for op in OPS}


@constexpr
def is_native(op):
    """Whether `op` runs on its native kernel; a constant at graph compile time."""
    return op in _native_ops


@constexpr
def is_ascendc(op):
    """Whether `op` has an AscendC operator that this process can call, on a device or on the host."""
    return op in _ascendc_ops


def operator_of(op):
    """OpType of the AscendC operator that serves `op`; None: none does."""
    return _ascendc_ops.get(op)


def device():
    """"CPU" or "Ascend", as selected."""
    return _device


def ascendc():
    """The AscendC of this process, or None."""
    return _ascendc


@constexpr
def operand_type():
    """What float32 operands of AscendC operators are rounded to, a MindSpore type; None: they stay."""
    return _operand_type


@functools.cache
def custom(name, **signature):
    """The CPU library's function `name` as an ops.Custom; signature: out_shape, out_dtype and bprop of ops.Custom.

    To be called from a @constexpr function of the op's file: in a graph, only that may make a primitive.
    """
    return ops.Custom(f"{_library}:{name}", func_type="aot", **signature)
