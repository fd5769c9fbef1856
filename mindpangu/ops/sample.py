"""Draw one token per sequence from its logits: temperature, top-k, top-p. B sequences, V vocabulary."""

import mindspore as ms
from mindspore import Tensor, ops
from mindspore.ops.primitive import constexpr

from . import kernels
from .kernels import is_native

_MASKED = -1e30


def _shapes(logits, uniforms, settings):
    return uniforms, uniforms, uniforms


def _dtypes(logits, uniforms, settings):
    return ms.int32, ms.float32, ms.float32


@constexpr
def _sample_kernel():
    return kernels.custom("Sample", out_shape=_shapes, out_dtype=_dtypes)


@constexpr
def _settings(temperature, top_k, top_p):
    return Tensor([temperature, top_k, top_p], ms.float32)


def sample(logits_BV, uniforms_B, temperature=1.0, top_k=0, top_p=1.0):
    """Token of each row by inversion of the cumulative distribution at uniforms_B, and its log-probabilities.

    uniforms_B: float32 in [0, 1 - 2^-23]; they carry all the randomness, so a token depends on nothing but its own
    logits and number. temperature 0 takes the most likely token (uniforms unused, log-probability at temperature 1).
    top_k 0 and top_p 1 keep every token; otherwise the kept tokens are the k most likely ones, then the smallest set of
    them that holds top_p of the mass (never empty), and the log-probability is that within the kept set.
    Returns tokens_B int32, logprobs_B float32, and kept_logprobs_B float32, the natural log of the kept tokens' mass
    among all at the temperature (0 where every token is kept, and at temperature 0), so that
    logprobs + kept_logprobs = log_softmax(logits / temperature)[tokens].
    """
    logits = ops.cast(logits_BV, ms.float32)
    if is_native("sample"):
        return _sample_kernel()(logits, uniforms_B, _settings(temperature, top_k, top_p))
    if temperature == 0:
        tokens = ops.cast(ops.argmax(logits, -1), ms.int32)
        logprobs = ops.gather_d(ops.log_softmax(logits, -1), 1, ops.expand_dims(tokens, 1))
        return tokens, logprobs.reshape(-1), ops.zeros_like(uniforms_B)
    logits = logits / temperature
    vocab_size = logits.shape[-1]
    if top_k == 0 and top_p >= 1.0:
        logprobs_BV = ops.log_softmax(logits, -1)
        choice = _invert(ops.exp(logprobs_BV), uniforms_B)
        logprobs = ops.gather_d(logprobs_BV, 1, ops.expand_dims(choice, 1))
        return choice, logprobs.reshape(-1), ops.zeros_like(uniforms_B)
    num_kept = min(top_k, vocab_size) if top_k > 0 else vocab_size
    sorted_logits, order = ops.topk(logits, num_kept)
    if top_p < 1.0:
        probs = ops.softmax(sorted_logits, -1)
        before = ops.cumsum(probs, -1) - probs
        sorted_logits = sorted_logits + ops.cast(before >= top_p, ms.float32) * _MASKED
    logprobs_BK = ops.log_softmax(sorted_logits, -1)
    choice = ops.expand_dims(_invert(ops.exp(logprobs_BK), uniforms_B), 1)
    tokens = ops.cast(ops.gather_d(order, 1, choice), ms.int32).reshape(-1)
    kept_logprobs = ops.zeros_like(uniforms_B)
    if num_kept < vocab_size or top_p < 1.0:
        # Of the most likely token, whose log-probabilities are the most precise: among all less within the kept ones.
        difference = ops.gather_d(ops.log_softmax(logits, -1), 1, order[:, :1]) - logprobs_BK[:, :1]
        kept_logprobs = ops.minimum(difference.reshape(-1), kept_logprobs)  # rounding may leave a little above 0
    return tokens, ops.gather_d(logprobs_BK, 1, choice).reshape(-1), kept_logprobs


def _invert(probs_BV, uniforms_B):
    """First index whose cumulative probability exceeds the uniform number; int32 [B]."""
    cumulative = ops.cumsum(probs_BV, -1)
    target = ops.expand_dims(uniforms_B, 1) * cumulative[:, -1:]
    return ops.cast(ops.cast(cumulative <= target, ms.float32).sum(-1), ms.int32)
