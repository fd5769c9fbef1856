"""AdamW's update of all parameters and the norm of all gradients (arXiv:1711.05101)."""

import mindspore as ms
from mindspore import ops
from mindspore.ops.primitive import constexpr

from . import kernels
from .kernels import is_native

_update = ops.AdamWeightDecay()


def _one(*_):
    return [1]


def _float32(*_):
    return ms.float32


@constexpr
def _adamw_kernel():
    return kernels.custom("AdamW", out_shape=_one, out_dtype=_float32)


@constexpr
def _norm_kernel():
    return kernels.custom("GlobalNorm", out_shape=_one, out_dtype=_float32)


def global_norm(grads):
    """Euclidean norm of all gradients together, float32, a scalar."""
    if is_native("adamw"):
        return _norm_kernel()(*grads).reshape(())
    total = ops.zeros((), ms.float32)
    for grad in grads:
        total = total + ops.square(ops.cast(grad, ms.float32)).sum()
    return ops.sqrt(total)


def adamw(parameters, m, v, grads, scale, hyperparameters_5, decays_P):
    """Update parameters and moments in place with grads * scale. Returns a tensor to depend on.

    hyperparameters_5: lr, beta1, beta2, eps, weight_decay with the bias correction folded in (see runtime.optim);
    decays_P: 1 for parameters that decay, 0 for the others. The moments are float32 or all bfloat16. For each:
        m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2;  p -= lr (m / (sqrt(v) + eps) + weight_decay p)
    """
    if is_native("adamw"):
        return _adamw_kernel()(hyperparameters_5, scale.reshape(1), decays_P, *parameters, *m, *v, *grads)
    lr, beta1, beta2, eps, decay = (hyperparameters_5[0], hyperparameters_5[1], hyperparameters_5[2],
                                    hyperparameters_5[3], hyperparameters_5[4])
    for i in range(len(parameters)):
        if m[i].dtype == ms.float32:
            _update(parameters[i], m[i], v[i], lr, beta1, beta2, eps, decay * decays_P[i], grads[i] * scale)
        else:
            # On Ascend; MindSpore's CPU backend assigns no bfloat16.
            weight, first, second = updated(parameters[i], m[i], v[i], grads[i] * scale, hyperparameters_5, decays_P[i])
            ops.assign(parameters[i], weight)
            ops.assign(m[i], ops.cast(first, m[i].dtype))
            ops.assign(v[i], ops.cast(second, v[i].dtype))
    return lr


def updated(parameter, m, v, grad, hyperparameters_5, decays):
    """What a parameter and its moments become, all float32."""
    lr, beta1, beta2 = hyperparameters_5[0], hyperparameters_5[1], hyperparameters_5[2]
    first = beta1 * ops.cast(m, ms.float32) + (1 - beta1) * grad
    second = beta2 * ops.cast(v, ms.float32) + (1 - beta2) * ops.square(grad)
    step = first / (ops.sqrt(second) + hyperparameters_5[3]) + hyperparameters_5[4] * decays * parameter
    return parameter - lr * step, first, second
