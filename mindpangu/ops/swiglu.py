"""The gated activation of the MLP (arXiv:2002.05202)."""

from mindspore import ops

from .kernels import is_native


def swiglu(gate_up):
    """silu(gate) * up, where gate_up [..., 2F] holds gate | up along the last axis. Returns [..., F]."""
    if is_native("swiglu"):
        return ops.swiglu(gate_up, -1)
    size = gate_up.shape[-1] // 2
    gate = gate_up[..., :size]
    return gate * ops.sigmoid(gate) * gate_up[..., size:]
