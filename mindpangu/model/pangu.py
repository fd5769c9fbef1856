"""The openPangu Embedded decoder, whole: a pre-norm Llama block with biases on q, k, v, o and a tied output projection.

    h += Attention(RMSNorm(h));  h += MLP(RMSNorm(h));  final RMSNorm;  logits = h @ embedding^T

T tokens, B sequences, D hidden, N query heads, M key/value heads, H head size, F feed-forward, V vocabulary,
C padded document count + 1, S cache length. Source: openPangu Embedded-1B technical report, section 2 and table 1.
"""

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.np_dtype import bfloat16

from ..ops.attention import attention, decode_attention
from ..ops.linear import linear
from ..ops.rms_norm import rms_norm
from ..ops.rope import inverse_frequencies, rope_tables, split_rope
from ..ops.swiglu import swiglu

DTYPES = {"float32": ms.float32, "bfloat16": ms.bfloat16, "float16": ms.float16}


def _parameter(array):
    return Parameter(Tensor.from_numpy(array))  # shares the array's memory: a copy less at 1B parameters


class Linear(nn.Cell):
    """x [T, in] @ weight^T [in, out] + bias, in x's dtype; the float32 master weight is cast on the fly."""

    def __init__(self, weight, bias=None):
        super().__init__()
        self.weight = _parameter(weight)
        self.bias = None if bias is None else _parameter(bias)

    def construct(self, x):
        return linear(x, self.weight, self.bias)


class Layer(nn.Cell):
    """One decoder layer. q, k, v share a projection, and so do gate and up."""

    def __init__(self, config, init):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.eps = config.rms_norm_eps
        hidden, q_size, kv_size = config.hidden_size, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.input_norm = _parameter(np.ones(hidden, np.float32))
        self.qkv_proj = Linear(init(q_size + 2 * kv_size, hidden), np.zeros(q_size + 2 * kv_size, np.float32))
        self.o_proj = Linear(init(hidden, q_size), np.zeros(hidden, np.float32))
        self.post_attention_norm = _parameter(np.ones(hidden, np.float32))
        self.gate_up_proj = Linear(init(2 * config.intermediate_size, hidden))
        self.down_proj = Linear(init(hidden, config.intermediate_size))
        self.split_heads = self.split_tokens = None  # see Pangu.split_sequences

    def project_qkv(self, h_TD, cos, sin):
        """Rotated q [T, N, H] and k [T, M, H], and v [T, M, H]."""
        x = rms_norm(h_TD, ops.cast(self.input_norm, h_TD.dtype), self.eps)
        return split_rope(self.qkv_proj(x), cos, sin, self.num_heads, self.num_kv_heads)

    def finish(self, h_TD, attended_TNH):
        """The rest of the layer after attention."""
        h = h_TD + self.o_proj(attended_TNH.reshape(h_TD.shape[0], -1))
        x = rms_norm(h, ops.cast(self.post_attention_norm, h.dtype), self.eps)
        return h + self.down_proj(swiglu(self.gate_up_proj(x)))

    def construct(self, h_TD, cos, sin, cu_seqlens_C, row_len, is_share=False):
        """Packed rows. Returns h_TD and this layer's k and v [T, M, H].

        is_share: this rank has T tokens of several ranks' rows; attention sees all of them for its share of the heads.
        """
        q, k, v = self.project_qkv(h_TD, cos, sin)
        if is_share:
            attended = self.split_tokens(self.attend_to_all(self.split_heads(q), self.split_heads(k),
                                                            self.split_heads(v), cu_seqlens_C, row_len))
        else:
            attended = attention(q, k, v, cu_seqlens_C, row_len)
        return self.finish(h_TD, attended), k, v

    def attend_to_all(self, q_TNH, k_TMH, v_TMH, cu_seqlens_C, row_len):
        """Attention over all ranks' tokens; zeros for those behind the last row, which make the shares equal."""
        num_tokens = q_TNH.shape[0] // row_len * row_len
        if num_tokens == q_TNH.shape[0]:
            return attention(q_TNH, k_TMH, v_TMH, cu_seqlens_C, row_len)
        attended = attention(q_TNH[:num_tokens], k_TMH[:num_tokens], v_TMH[:num_tokens], cu_seqlens_C, row_len)
        return ops.concat((attended, ops.zeros_like(q_TNH[num_tokens:])), 0)

    def decode(self, h_BD, cos, sin, k_cache, v_cache, positions_B):
        """One new token per sequence; the caches are Parameters [B, M, S, H], written in place at positions_B."""
        q, k, v = self.project_qkv(h_BD, cos, sin)
        return self.finish(h_BD, decode_attention(q, k, v, k_cache, v_cache, positions_B))


class Pangu(nn.Cell):
    """The decoder up to the final norm; the output projection belongs to the loss or the sampler (see `logits`).

    config: mindpangu.config.ModelConfig; seed: of the initial weights (normal, config.init_std; biases 0, norms 1);
    dtype: of the activations, weights stay float32; zero_weights skips the random numbers when weights are loaded next.
    frozen_dtype: ms.bfloat16 stores the matrices in it, for a model that is not trained: half the memory, and half to
    read for every token.
    """

    def __init__(self, config, seed=0, dtype=ms.float32, zero_weights=False, frozen_dtype=None):
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.eps = config.rms_norm_eps
        random = np.random.Generator(np.random.Philox(seed))

        stored = bfloat16 if frozen_dtype == ms.bfloat16 else np.float32

        def init(rows, columns):
            if zero_weights:
                return np.zeros((rows, columns), stored)
            weight = random.standard_normal((rows, columns), dtype=np.float32)
            return np.multiply(weight, np.float32(config.init_std), out=weight).astype(stored, copy=False)

        self.embedding = _parameter(init(config.vocab_size, config.hidden_size))
        self.layers = nn.CellList([Layer(config, init) for _ in range(config.num_layers)])
        self.norm = _parameter(np.ones(config.hidden_size, np.float32))
        self.lm_head = None if config.tie_embedding else _parameter(init(config.vocab_size, config.hidden_size))
        self.inverse_frequencies = Tensor(inverse_frequencies(config.head_dim, config.rope_theta))
        if frozen_dtype is not None:
            for parameter in self.get_parameters():
                parameter.requires_grad = False
        self.is_split = False

    def split_sequences(self, split_heads, split_tokens):
        """From now on construct gets this rank's share of the tokens (Ulysses, arXiv:2309.14509); cells of
        ops.collectives."""
        self.is_split = True
        for layer in self.layers:
            layer.split_heads, layer.split_tokens = split_heads, split_tokens

    def head_weight(self):
        """The output projection [V, D], in the activations' dtype."""
        return ops.cast(self.stored_head_weight(), self.dtype)

    def stored_head_weight(self):
        """The output projection [V, D] as it is stored: float32, or bfloat16 of a frozen model."""
        return self.embedding if self.lm_head is None else self.lm_head

    def embed(self, tokens_T):
        return ops.cast(ops.gather(self.embedding, tokens_T, 0), self.dtype)

    def final_norm(self, h_TD):
        return rms_norm(h_TD, ops.cast(self.norm, self.dtype), self.eps)

    def construct(self, tokens_T, positions_T, cu_seqlens_C, row_len):
        """Hidden states [T, D] of packed rows after the final norm.

        tokens_T, positions_T int32; cu_seqlens_C int64 and row_len as in ops.attention. After split_sequences T counts
        this rank's tokens, and cu_seqlens_C those of all ranks.
        """
        hidden, _, _ = self.run_layers(tokens_T, positions_T, cu_seqlens_C, row_len, self.is_split)
        return hidden

    def prefill(self, tokens_T, positions_T, cu_seqlens_C, row_len):
        """As construct without split_sequences, and every layer's keys and values: hidden_TD, tuple of k_TMH, tuple of
        v_TMH."""
        return self.run_layers(tokens_T, positions_T, cu_seqlens_C, row_len, False)

    def run_layers(self, tokens_T, positions_T, cu_seqlens_C, row_len, is_share):
        cos, sin = rope_tables(positions_T, self.inverse_frequencies, self.dtype)
        h = self.embed(tokens_T)
        keys, values = (), ()
        for layer in self.layers:
            h, k, v = layer(h, cos, sin, cu_seqlens_C, row_len, is_share)
            keys = keys + (k,)
            values = values + (v,)
        return self.final_norm(h), keys, values

    def decode(self, tokens_B, positions_B, k_caches, v_caches):
        """Logits [B, V] of one more token per sequence; the caches (a Parameter [B, M, S, H] a layer) are written."""
        cos, sin = rope_tables(positions_B, self.inverse_frequencies, self.dtype)
        h = self.embed(tokens_B)
        for i in range(len(self.layers)):
            h = self.layers[i].decode(h, cos, sin, k_caches[i], v_caches[i], positions_B)
        return self.logits(self.final_norm(h))

    def logits(self, hidden_TD):
        return linear(hidden_TD, self.stored_head_weight())
