"""Teachers that mindformers computes: an Annotator whose logits come from mindformers' own GPTModel.

mindformers is imported where a model is built, and nowhere else: that takes 5 s.

T tokens, C padded document count + 1, D hidden, V vocabulary.
"""

import contextlib
import io
import os
import tempfile

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.common.np_dtype import bfloat16

from ..model.mindformers import mindformers_layouts
from ..model.weights import open_weights, read_config, read_parts
from .annotate import Annotator, check_top_k

# mindformers asks for a seq_length of at least that of its compressed mask, which serves rows of every length.
_MASK_LEN = 2048
_NUMPY_DTYPES = {"float32": np.float32, "bfloat16": bfloat16}
_log_folders = []


class MindformersAnnotator(Annotator):
    """The Annotator of a Hugging Face folder, computed by mindformers.

    mode: "graph", as mindformers' layers run in graphs alone. precision: "float32" or "bfloat16", of weights and
    activations alike; bfloat16 on Ascend only. At float32 mindformers hands attention its operands in float16. On a
    CPU the process needs the CPU library (ops.cpu.build).
    Raises ValueError for a folder that does not hold the weights of its config.json, or where this cannot run.
    """

    def __init__(self, folder, *, top_k, row_len, num_rows, chunk_size, mode="graph", precision="float32"):
        if precision not in _NUMPY_DTYPES:
            raise ValueError(f"precision={precision!r} with mindformers as the teacher: expected one of "
                             f"{list(_NUMPY_DTYPES)}.")
        if mode != "graph":
            raise ValueError(f"mode={mode!r} with mindformers as the teacher: its layers run in graphs alone; use "
                             "run.mode=graph.")
        if ms.get_context("device_target") == "CPU":
            if "MS_OP_PLUGIN_PATH" not in os.environ:
                raise ValueError("mindformers as the teacher on a CPU: MindSpore's CPU backend lacks most of its "
                                 "primitives, the CPU library has them; use run.kernels=native.")
            if precision != "float32":
                raise ValueError(f"precision={precision!r} with mindformers as the teacher on a CPU: MindSpore's CPU "
                                 "backend has no SiLU for it; use float32.")
        config = read_config(folder)
        check_top_k(top_k, config)  # before gigabytes are read
        super().__init__(GptDecoder(config, folder, precision), top_k=top_k, row_len=row_len, num_rows=num_rows,
                         chunk_size=chunk_size, mode=mode)


class GptDecoder(nn.Cell):
    """mindformers' GPTModel with a Hugging Face folder's weights, called as a model.pangu.Pangu is.

    Rows are packed as in mindformers' own training (use_eod_attn_mask_compression, use_eod_reset): one sequence of all
    tokens, in which actual_seq_len ends the documents.
    """

    def __init__(self, config, folder, precision):
        super().__init__(auto_prefix=False)  # parameters keep mindformers' names
        stored = open_weights(config, folder)
        self.config = config
        self.gpt = _build_gpt(config, precision)
        layouts = mindformers_layouts(config)
        parameters = {parameter.name: parameter for parameter in self.gpt.get_parameters()}
        found = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        expected = {name: layout.shape for name, layout in layouts.items()}
        if found != expected:
            different = sorted({name for name, _ in found.items() ^ expected.items()})
            raise ValueError(f"mindformers' GPTModel has other parameters than those of 1.9.0, which this code knows: "
                             f"{different[:8]}; install mindformers==1.9.0.")
        for name, layout in layouts.items():
            array = layout.arrange(read_parts(stored, layout.parts, _NUMPY_DTYPES[precision]))
            parameters[name].set_data(Tensor.from_numpy(array))
            parameters[name].requires_grad = False

    def construct(self, tokens_T, positions_T, cu_seqlens_C, row_len):
        """Hidden states [T, D] after the final norm; arguments as Pangu's."""
        tokens, positions = ops.expand_dims(tokens_T, 0), ops.cast(ops.expand_dims(positions_T, 0), ms.float32)
        _, mask, _, _, _ = self.gpt.preprocess_labels_and_masks(tokens)
        hidden_T1D, _, _, _ = self.gpt.language_model(tokens, positions, mask, None, actual_seq_len=cu_seqlens_C[1:])
        return hidden_T1D.reshape(tokens_T.shape[0], -1)

    def logits(self, hidden_TD):
        """[T, V]: mindformers' output layer on some positions; its own forward pass computes all of them at once."""
        weight = self.gpt.shared_embedding_or_output_weight() if self.config.tie_embedding else None
        logits_T1V, _ = self.gpt.output_layer(ops.expand_dims(hidden_TD, 1), weight)
        return logits_T1V.reshape(hidden_TD.shape[0], -1)


class _Nowhere(io.TextIOBase):
    def write(self, text):
        return len(text)


def _build_gpt(config, precision):
    """GPTModel for a ModelConfig, its weights zero."""
    if "LOG_MF_PATH" not in os.environ:  # mindformers' own variable; without it the log is ./output/log
        _log_folders.append(tempfile.TemporaryDirectory(prefix="mindformers_log_"))  # ends with the process
        os.environ["LOG_MF_PATH"] = _log_folders[0].name
    # Its logger goes on writing to what is stdout at its import; its lines, tens for a model, are all in the log.
    with contextlib.redirect_stdout(_Nowhere()):
        from mindformers.core.context.build_context import build_mf_context
        from mindformers.parallel_core.training_graph.base_models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from mindformers.parallel_core.training_graph.base_models.gpt.gpt_model import GPTModel
        from mindformers.parallel_core.training_graph.tensor_parallel.layers import RowParallelLinear
        from mindformers.parallel_core.transformer_config import TransformerConfig
        from mindformers.parallel_core.utils.init_method import init_method_zero

    class BiasedRowParallelLinear(RowParallelLinear):
        """o_proj with a bias: the one option, add_bias_linear, would give the MLP biases as well."""

        def __init__(self, *arguments, bias, **keywords):
            super().__init__(*arguments, bias=True, **keywords)

    build_mf_context({"use_legacy": False, "context": {}, "parallel": {}})
    zeros = init_method_zero(getattr(ms, precision))
    transformer = TransformerConfig(
        num_layers=config.num_layers, hidden_size=config.hidden_size, num_attention_heads=config.num_heads,
        num_query_groups=config.num_kv_heads, kv_channels=config.head_dim, ffn_hidden_size=config.intermediate_size,
        vocab_size=config.vocab_size, max_position_embeddings=config.max_seq_len,
        seq_length=max(_MASK_LEN, config.max_seq_len), pad_token_id=config.pad_id,
        normalization="RMSNorm", layernorm_epsilon=config.rms_norm_eps, hidden_act="silu", gated_linear_unit=True,
        add_bias_linear=False, add_qkv_bias=True, position_embedding_type="rope", rotary_base=config.rope_theta,
        use_flash_attention=True, use_eod_attn_mask_compression=True, use_eod_reset=True,
        hidden_dropout=0.0, attention_dropout=0.0, init_method=zeros, output_layer_init_method=zeros,
        compute_dtype=precision, params_dtype=precision, layernorm_compute_dtype=precision,  # RmsNorm's inputs agree
        softmax_compute_dtype="float32", rotary_dtype="float32")
    layer = get_gpt_layer_local_spec()
    layer.submodules.self_attention.submodules.linear_proj = BiasedRowParallelLinear
    gpt = GPTModel(
        transformer, layer, vocab_size=config.vocab_size, max_sequence_length=config.max_seq_len,
        position_embedding_type="rope", rotary_base=config.rope_theta,
        share_embeddings_and_output_weights=config.tie_embedding)
    return gpt.set_train(False)
