"""Cross-entropy of a chunk of logits with its gradient. N positions, V vocabulary."""

import mindspore as ms
from mindspore import ops
from mindspore.ops.primitive import constexpr

from . import kernels
from .kernels import is_native


def cross_entropy(logits_NV, labels_N, weights_N):
    """-log softmax(logits)[label] per position, in nats, and the gradient of sum(weights * ce).

    Returns ce_N float32 and dlogits_NV in the logits' dtype; neither is differentiable.
    """
    if is_native("cross_entropy"):
        return _kernel()(logits_NV, labels_N, weights_N)
    logits = ops.cast(logits_NV, ms.float32)
    lse_N1 = ops.logsumexp(logits, -1, True)
    labels_N1 = ops.expand_dims(labels_N, 1)
    ce_N = (lse_N1 - ops.gather_d(logits, 1, labels_N1)).reshape(-1)
    weights_N1 = ops.expand_dims(weights_N, 1)
    dlogits = ops.tensor_scatter_elements(ops.exp(logits - lse_N1) * weights_N1, labels_N1, -weights_N1, 1, "add")
    return ce_N, ops.cast(dlogits, logits_NV.dtype)


@constexpr
def _kernel():
    return kernels.custom("CrossEntropy", out_shape=_shapes, out_dtype=_dtypes)


def _shapes(logits, labels, weights):
    return [logits[0]], logits


def _dtypes(logits, labels, weights):
    return ms.float32, logits
