"""Which kernel serves each op: chosen once per process by `select`, read by the ops when a graph is compiled."""

import functools

from mindspore import ops
from mindspore.ops.primitive import constexpr

OPS = ("adamw", "attention", "cached_attention", "cross_entropy", "head_loss", "linear", "rms_norm", "rope", "sample",
       "swiglu", "topk_kl")
# The ops that have a native kernel, by device. What is not listed is composed from primitives on every device.
NATIVE_OPS = {
    "CPU": OPS,
    "Ascend": ("attention", "rms_norm", "swiglu"),
}

_native_ops: set[str] = set()
_library = None


def select(kernels, reference_ops, device, library=None):
    """Choose the kernels of this process before the first graph is compiled.

    kernels: "native" or "reference"; reference_ops: names of ops that run on their reference all the same; library:
    path of the CPU library (see ops.cpu.build), which native kernels need on a CPU.
    Returns {op: "native" | "reference"}. Raises ValueError for an unknown op and for a device without native kernels.
    """
    unknown = sorted(set(reference_ops) - set(OPS))
    if unknown:
        raise ValueError(f"run.reference_ops={list(reference_ops)}: unknown {unknown}; the ops are {list(OPS)}.")
    if kernels == "native" and not NATIVE_OPS[device]:
        raise ValueError(f"run.kernels=native: this version has no native kernels for run.device={device}; "
                         "use run.kernels=reference.")
    global _library
    _library = library
    _native_ops.clear()
    if kernels == "native":
        _native_ops.update(set(NATIVE_OPS[device]) - set(reference_ops))
    return {op: "native" if op in _native_ops else "reference" for op in OPS}


@constexpr
def is_native(op):
    """Whether `op` runs on its native kernel; a constant at graph compile time."""
    return op in _native_ops


@functools.cache
def custom(name, **signature):
    """The CPU library's function `name` as an ops.Custom; signature: out_shape, out_dtype and bprop of ops.Custom.

    To be called from a @constexpr function of the op's file: in a graph, only that may make a primitive.
    """
    return ops.Custom(f"{_library}:{name}", func_type="aot", **signature)
