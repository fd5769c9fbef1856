"""The decoder as a static float16 graph for the edge: a step of T tokens over a key/value cache that comes and goes.

Composed of general primitives, which MindSpore's CPU backend has too: no custom operator, none of the fused ones that
CANN lacks on a 310B (RmsNorm, Swiglu, FlashAttentionScore), no bfloat16. Matrices, caches and what flows between them
are float16; norms, tables of rotation angles and softmax are computed in float32.

T tokens, D hidden, N query heads, M key/value heads, H head size, S cache length, V vocabulary.
"""

import math

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from ..ops.rope import inverse_frequencies
from .weights import hugging_face_names

_MASKED = np.float32(-1e30)  # finite, so that exp gives exactly 0 without inf - inf
_LIMIT = 65504.0  # float16's largest
_SHOWN = 8


def half_weights(model):
    """{path: array} of a Pangu's parameters: matrices and biases float16, norms float32.

    Raises ValueError that names the weights (as in Hugging Face folders) which float16 cannot hold.
    """
    arrays, overflows = {}, []
    names = hugging_face_names(model.config)
    for path, parameter in model.parameters_and_names():
        array = parameter.asnumpy().astype(np.float32, copy=False)
        row = 0
        for name, shape in names[path]:
            # NaN included. What float16 rounds to infinity starts at 65520; beyond its largest number is an overflow.
            largest = float(np.abs(array[row:row + shape[0]]).max())
            if not largest <= _LIMIT:
                overflows.append(f"{name}: {largest:g}")
            row += shape[0]
        is_norm = path.endswith("norm")
        arrays[path] = array.copy() if is_norm else np.clip(array, -_LIMIT, _LIMIT).astype(np.float16)
    if overflows:
        more = f"\n  and {len(overflows) - _SHOWN} more" if len(overflows) > _SHOWN else ""
        raise ValueError(f"{len(overflows)} weights do not fit float16, whose largest number is {_LIMIT:g}; name: "
                         "largest magnitude\n  " + "\n  ".join(overflows[:_SHOWN]) + more +
                         "\nThe edge chips have no bfloat16: train with a smaller learning rate or more weight decay, "
                         "or scale these weights down, and export again.")
    return arrays


class StaticDecoder(nn.Cell):
    """One step: T tokens at given positions, over caches of S positions that are inputs and outputs.

    The same cell is the prefill graph (T a prompt's bucket) and the decode graph (T = 1).
    config: ModelConfig; arrays: as half_weights gives them.
    """

    def __init__(self, config, arrays, cache_len):
        super().__init__()
        self.num_layers, self.num_heads, self.num_kv_heads = config.num_layers, config.num_heads, config.num_kv_heads
        self.head_dim, self.cache_len = config.head_dim, cache_len
        self.embedding = _parameter(arrays["embedding"])
        self.layers = nn.CellList([_StaticLayer(arrays, f"layers.{i}") for i in range(config.num_layers)])
        self.norm = _parameter(arrays["norm"])
        self.lm_head = None if config.tie_embedding else _parameter(arrays["lm_head"])
        # Tables instead of sine and cosine on the device: angles go up to S, where a fast sine is not exact.
        angles = np.outer(np.arange(cache_len, dtype=np.float32), inverse_frequencies(config.head_dim,
                                                                                      config.rope_theta))
        angles = np.concatenate((angles, angles), 1)
        self.cos, self.sin = Tensor(np.cos(angles).astype(np.float16)), Tensor(np.sin(angles).astype(np.float16))
        self.places = Tensor(np.arange(cache_len, dtype=np.int32).reshape(1, -1))
        self.first_rows = Tensor(np.arange(config.num_kv_heads, dtype=np.int32).reshape(-1, 1) * cache_len)
        # Constants are tensors: a Python number becomes primitives (Muls, Adds) that the converter does not know.
        self.eps = Tensor(np.float32(config.rms_norm_eps))
        self.scale = Tensor(np.float16(1 / math.sqrt(config.head_dim)))
        self.masked = Tensor(_MASKED)

    def construct(self, tokens_T, positions_T, last, *caches):
        """Logits [1, V] after the token in place `last` (int32 [1]), float32, and the caches with T more entries.

        caches: k and v of the first layer, of the second, ..., float16 [M * S, H]; row m * S + s holds position s.
        """
        h = ops.gather(self.embedding, tokens_T, 0)
        cos = ops.expand_dims(ops.gather(self.cos, positions_T, 0), 1)
        sin = ops.expand_dims(ops.gather(self.sin, positions_T, 0), 1)
        later = ops.cast(ops.Greater()(self.places, ops.expand_dims(positions_T, 1)), ms.float32)
        mask_1TS = ops.expand_dims(later * self.masked, 0)
        rows = (self.first_rows + ops.expand_dims(positions_T, 0)).reshape(-1, 1)
        written = ()
        for i in range(self.num_layers):
            layer = self.layers[i]
            qkv = self.linear(self.rms_norm(h, layer.input_norm), layer.qkv_weight) + layer.qkv_bias
            heads = qkv.reshape(-1, self.num_heads + 2 * self.num_kv_heads, self.head_dim)
            q = self.rotate(heads[:, :self.num_heads], cos, sin) * self.scale
            k = self.rotate(heads[:, self.num_heads:self.num_heads + self.num_kv_heads], cos, sin)
            v = heads[:, self.num_heads + self.num_kv_heads:]
            k_cache = self.write(caches[2 * i], rows, k)
            v_cache = self.write(caches[2 * i + 1], rows, v)
            written = written + (k_cache, v_cache)
            attended = self.linear(self.attend(q, k_cache, v_cache, mask_1TS), layer.o_weight) + layer.o_bias
            h = h + attended
            gate, up = ops.Split(1, 2)(self.linear(self.rms_norm(h, layer.post_attention_norm), layer.gate_up_weight))
            h = h + self.linear(gate * ops.Sigmoid()(gate) * up, layer.down_weight)
        h = self.rms_norm(ops.gather(h, last, 0), self.norm)
        logits = self.linear(h, self.embedding if self.lm_head is None else self.lm_head)
        return (ops.cast(logits, ms.float32), *written)

    def linear(self, x, weight):
        return ops.MatMul(transpose_b=True)(x, weight)

    def rms_norm(self, x, weight):
        x32 = ops.cast(x, ms.float32)
        scale = ops.Rsqrt()(ops.ReduceMean(True)(ops.Square()(x32), -1) + self.eps)
        return ops.cast(x32 * scale * weight, ms.float16)

    def rotate(self, x, cos, sin):
        first, second = ops.Split(2, 2)(x)
        return x * cos + ops.concat((ops.Neg()(second), first), 2) * sin

    def write(self, cache, rows, x_TMH):
        """Not ScatterNdUpdate, which overwrites its input: an input of the graph is the caller's."""
        x = ops.transpose(x_TMH, (1, 0, 2)).reshape(-1, self.head_dim)
        return ops.TensorScatterUpdate()(cache, rows, x)

    def attend(self, q_TNH, k_cache, v_cache, mask_1TS):
        """[T, N * H]. Queries that share a key/value head are rows of one product."""
        q = ops.transpose(q_TNH, (1, 0, 2)).reshape(self.num_kv_heads, -1, self.head_dim)
        k = k_cache.reshape(self.num_kv_heads, self.cache_len, self.head_dim)
        v = v_cache.reshape(self.num_kv_heads, self.cache_len, self.head_dim)
        scores = ops.BatchMatMul(transpose_b=True)(q, k).reshape(self.num_heads, -1, self.cache_len)
        weights = ops.cast(ops.Softmax(-1)(ops.cast(scores, ms.float32) + mask_1TS), ms.float16)
        out = ops.BatchMatMul()(weights.reshape(self.num_kv_heads, -1, self.cache_len), v)
        out = ops.transpose(out.reshape(self.num_heads, -1, self.head_dim), (1, 0, 2))
        return out.reshape(-1, self.num_heads * self.head_dim)


class _StaticLayer(nn.Cell):
    def __init__(self, arrays, path):
        super().__init__()
        self.input_norm = _parameter(arrays[f"{path}.input_norm"])
        self.qkv_weight = _parameter(arrays[f"{path}.qkv_proj.weight"])
        self.qkv_bias = _parameter(arrays[f"{path}.qkv_proj.bias"])
        self.o_weight = _parameter(arrays[f"{path}.o_proj.weight"])
        self.o_bias = _parameter(arrays[f"{path}.o_proj.bias"])
        self.post_attention_norm = _parameter(arrays[f"{path}.post_attention_norm"])
        self.gate_up_weight = _parameter(arrays[f"{path}.gate_up_proj.weight"])
        self.down_weight = _parameter(arrays[f"{path}.down_proj.weight"])


def _parameter(array):
    return Parameter(Tensor.from_numpy(array), requires_grad=False)
