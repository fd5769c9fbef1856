"""The AscendC operators of ascend_kernels as primitives: aclnn functions on Ascend, their sources' host build on a CPU.

Not run on a device: what MindSpore's front end makes of these calls is tested, and on a CPU what the operators compute.
"""

import functools
from typing import NamedTuple

import mindspore as ms
from mindspore import ops
from mindspore.ops import CustomRegOp

from . import kernels

_OPERAND = ""  # in place of a type: that of the operands, which an operator has several of


class _Signature(NamedTuple):
    """Names and types in the order of the operator's definition; an output that is an input updated is left out."""

    operands: tuple
    inputs: dict
    attributes: dict
    outputs: dict


_FLOATS = ("float16", "bfloat16", "float32")
_LOGITS = {"logits": _OPERAND, "labels": "int32", "teacher_ids": "int32"}
_TEACHER = {"teacher_logprobs": "float32", "ce_weights": "float32", "kl_weights": "float32"}
_STATS = {"rest_max": "float32", "rest_sum": "float32", "rest_argmax": "int32", "top_logits": "float32",
          "label_logits": "float32"}
_FORM = {"temperature": "float", "tail": "int", "with_gradient": "bool"}
_LOSSES = {"ce": "float32", "kl": "float32", "teacher_mass": "float32", "agreement": "float32", "dlogits": _OPERAND}
_QKV = {"q": _OPERAND, "k": _OPERAND, "v": _OPERAND}
SIGNATURES = {
    "PanguTopkKl": _Signature(_FLOATS, _LOGITS | _TEACHER, _FORM, _LOSSES),
    "PanguTopkKlStats": _Signature(_FLOATS, _LOGITS, {"offset": "int"}, _STATS),
    "PanguTopkKlFromStats": _Signature(_FLOATS, _LOGITS | _TEACHER | _STATS,
                                       _FORM | {"offset": "int", "vocab_size": "int"}, _LOSSES),
    "PanguPackedAttention": _Signature(_FLOATS[:2], _QKV | {"cu_seqlens": "int64"}, {"scale": "float"},
                                       {"out": _OPERAND, "lse": "float32"}),
    "PanguPackedAttentionGrad": _Signature(
        _FLOATS[:2], _QKV | {"out": _OPERAND, "dout": _OPERAND, "lse": "float32", "cu_seqlens": "int64"},
        {"scale": "float"}, {"dq": _OPERAND, "dk": _OPERAND, "dv": _OPERAND}),
    "PanguDecodeAttention": _Signature(
        _FLOATS[:1], _QKV | {"k_cache": _OPERAND, "v_cache": _OPERAND, "positions": "int32"}, {"scale": "float"},
        {"out": _OPERAND}),
}


def custom(op_type, **signature):
    """The operator as an ops.Custom, to be called with its inputs and then its attributes; signature: out_shape,
    out_dtype and bprop of ops.Custom. On the host the inputs that the operator updates are further outputs.

    To be called from a @constexpr function of the op's file: in a graph, only that may make a primitive.
    """
    return _custom(op_type, kernels.ascendc().run, **signature)


@functools.cache
def _custom(op_type, run, **signature):
    if run is None:
        return ops.Custom(f"aclnn{op_type}", func_type="aot", reg_info=registration(op_type), **signature)
    num_inputs, num_attributes = len(SIGNATURES[op_type].inputs), len(SIGNATURES[op_type].attributes)

    def launch(*arguments):
        outputs = run(op_type, arguments[:num_inputs], arguments[num_inputs:])
        return outputs[0] if len(outputs) == 1 else outputs

    primitive = ops.Custom(launch, func_type="pyfunc", **signature)
    # MindSpore counts the function's parameters, and takes what comes beyond them for a tuple.
    primitive.add_prim_attr("inputs_num", num_inputs + num_attributes)
    return primitive


def registration(op_type):
    """What MindSpore has to know of the operator on Ascend. Its own reading of an installed package sorts inputs by
    name: input10 before input2, and PanguTopkKlFromStats has eleven."""
    operands, inputs, attributes, outputs = SIGNATURES[op_type]
    info = CustomRegOp(f"aclnn{op_type}").target("Ascend")
    for place, name in enumerate(inputs):
        info.input(place, name, "required")
    for name, kind in attributes.items():
        info.attr(name, "required", kind)
    for place, name in enumerate(outputs):
        info.output(place, name, "required")
    for operand in operands:
        info.dtype_format(*((kind or operand, "DefaultFormat") for kind in (*inputs.values(), *outputs.values())))
    return info.get_op_info()


def as_operand(x):
    """x as an operator's operand: on the host, float32 is rounded to the run's 16-bit type."""
    operand_type = kernels.operand_type()
    if operand_type is not None and x.dtype == ms.float32:
        return ops.cast(x, operand_type)
    return x
