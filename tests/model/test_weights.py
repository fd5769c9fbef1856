"""Weight files against safetensors, transformers and torch, which read and write them independently."""

import json
import shutil

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor, ops
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from mindpangu.config import ModelConfig
from mindpangu.model.pangu import Pangu
from mindpangu.model.weights import (
    config_json,
    hugging_face_names,
    load_model,
    load_weights,
    read_config,
    save_weights,
)

pytestmark = pytest.mark.usefixtures("mindspore_cpu")
TIED, UNTIED = 2, 1  # seeds of random_config


def weights_by_name(model):
    """Hugging Face name -> array, split by hand."""
    c = model.config
    ours = {path: parameter.asnumpy() for path, parameter in model.parameters_and_names()}
    q, kv, ffn = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.intermediate_size
    named = {"model.embed_tokens.weight": ours["embedding"], "model.norm.weight": ours["norm"]}
    for i in range(c.num_layers):
        for kind in ("weight", "bias"):
            fused = ours[f"layers.{i}.qkv_proj.{kind}"]
            named[f"model.layers.{i}.self_attn.q_proj.{kind}"] = fused[:q]
            named[f"model.layers.{i}.self_attn.k_proj.{kind}"] = fused[q:q + kv]
            named[f"model.layers.{i}.self_attn.v_proj.{kind}"] = fused[q + kv:]
            named[f"model.layers.{i}.self_attn.o_proj.{kind}"] = ours[f"layers.{i}.o_proj.{kind}"]
        named[f"model.layers.{i}.mlp.gate_proj.weight"] = ours[f"layers.{i}.gate_up_proj.weight"][:ffn]
        named[f"model.layers.{i}.mlp.up_proj.weight"] = ours[f"layers.{i}.gate_up_proj.weight"][ffn:]
        named[f"model.layers.{i}.mlp.down_proj.weight"] = ours[f"layers.{i}.down_proj.weight"]
        named[f"model.layers.{i}.input_layernorm.weight"] = ours[f"layers.{i}.input_norm"]
        named[f"model.layers.{i}.post_attention_layernorm.weight"] = ours[f"layers.{i}.post_attention_norm"]
    if not c.tie_embedding:
        named["lm_head.weight"] = ours["lm_head"]
    return named


def assert_holds(model, state):
    """The model's weights are, to the bit, those of a torch state dict."""
    named = weights_by_name(model)
    if model.config.tie_embedding:
        state = {name: weight for name, weight in state.items() if name != "lm_head.weight"}
    assert named.keys() == state.keys()
    for name, array in named.items():
        assert np.array_equal(array, state[name].float().numpy()), name


@pytest.fixture
def folder(random_config, random_llama, tmp_path):
    """Weights of a tied model as transformers saves them: (ModelConfig, folder)."""
    config = random_config(TIED)
    random_llama(config, 0).save_pretrained(tmp_path / "tied")
    return config, tmp_path / "tied"


def change(folder, **tensors):
    """Rewrite model.safetensors with some tensors replaced (None: removed); "__" in a name stands for "."."""
    state = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        state.pop(name.replace("__", "."), None)
        if tensor is not None:
            state[name.replace("__", ".")] = tensor
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", [TIED, UNTIED])
@pytest.mark.parametrize("shard_size", ["1GB", "9KB"])
def test_loaded_weights_are_those_that_transformers_saved(dtype, seed, shard_size, random_config, random_llama,
                                                          tmp_path):
    config = random_config(seed)
    llama = random_llama(config, seed).to(dtype)
    llama.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "9KB")
    model = load_model(tmp_path)
    assert model.config == config
    assert_holds(model, llama.state_dict())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("seed", [TIED, UNTIED])
@pytest.mark.parametrize("max_shard_gib", [4, 9 / 2**20])
def test_transformers_opens_saved_weights(dtype, seed, max_shard_gib, random_config, tmp_path):
    model = Pangu(random_config(seed), seed=7)
    save_weights(model, tmp_path, dtype, max_shard_gib)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert (len(shards) > 2) == (max_shard_gib < 1)
    for shard in shards:  # 9 KiB, unless one tensor alone is larger; 4 KiB of header at the most
        assert max_shard_gib > 1 or shard.stat().st_size < 13 * 1024 or len(load_file(shard)) == 1
    llama = LlamaForCausalLM.from_pretrained(tmp_path)
    assert llama.config.tie_word_embeddings == model.config.tie_embedding
    for name, array in weights_by_name(model).items():
        expected = torch.tensor(array).to(getattr(torch, dtype)).float()
        assert torch.equal(llama.state_dict()[name], expected), name
    assert_holds(load_model(tmp_path), llama.state_dict())


def test_bfloat16_rounds_like_torch_for_every_kind_of_value(tmp_path):
    model = Pangu(ModelConfig(hidden_size=64, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2, vocab_size=2048,
                              intermediate_size=1, max_seq_len=8, eos_id=2))
    random = np.random.default_rng(0)
    bits = random.integers(0, 2**32, model.embedding.shape, np.uint32)  # subnormals, infinities and NaN included
    bits[1] = (bits[1] & 0xFFFF0000) | 0x8000  # ties
    bits[2, :6] = [0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000]
    ops.assign(model.embedding, Tensor(bits.view(np.float32)))
    save_weights(model, tmp_path, "bfloat16")
    ours = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    expected = torch.tensor(bits.view(np.float32)).to(torch.bfloat16)
    assert torch.equal(ours.isnan(), expected.isnan())
    assert torch.equal(ours[~ours.isnan()].view(torch.int16), expected[~expected.isnan()].view(torch.int16))


def test_a_compiled_graph_computes_with_the_weights_loaded_afterwards(random_config, random_llama, tmp_path):
    config = random_config(UNTIED)
    random_llama(config, 3).save_pretrained(tmp_path)
    model = Pangu(config)

    @ms.jit
    def graph(tokens_T, positions_T, cu_seqlens_C):
        return model.logits(model(tokens_T, positions_T, cu_seqlens_C, 8))

    inputs = [Tensor(np.arange(8, dtype=np.int32)), Tensor(np.arange(8, dtype=np.int32)), Tensor(np.array([0, 8]))]
    before = graph(*inputs).asnumpy().copy()
    load_weights(model, tmp_path)
    after = graph(*inputs).asnumpy()
    expected = load_model(tmp_path)
    expected = expected.logits(expected(*inputs, 8)).asnumpy()
    assert np.abs(after - expected).max() < 1e-6 * np.abs(expected).max() < np.abs(after - before).max()


def test_a_tied_file_may_hold_the_output_projection_if_it_is_the_embedding(folder):
    config, path = folder
    embedding = load_file(path / "model.safetensors")["model.embed_tokens.weight"]
    change(path, lm_head__weight=embedding.clone())
    load_weights(Pangu(config), path)
    other = embedding.clone()
    other[-1, -1] += 1
    change(path, lm_head__weight=other)
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load_weights(Pangu(config), path)


def test_stray_rotary_tables_are_ignored_by_their_name_only(folder):
    config, path = folder
    change(path, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(3, dtype=torch.float64))
    load_weights(Pangu(config), path)
    change(path, model__layers__0__rotary_emb__inv_freq=torch.ones(3))
    with pytest.raises(ValueError, match=r"model\.layers\.0\.rotary_emb\.inv_freq with shape \[3\] is unknown"):
        load_weights(Pangu(config), path)


def test_one_error_lists_every_tensor_that_does_not_fit_and_assigns_none(folder):
    config, path = folder
    change(path, model__norm__weight=None, model__layers__0__self_attn__o_proj__bias=None,
           model__layers__0__mlp__up_proj__bias=torch.zeros(4),
           model__layers__99__mlp__up_proj__weight=torch.zeros(2, 3),
           model__layers__0__mlp__down_proj__weight=torch.zeros(config.intermediate_size, config.hidden_size),
           model__layers__0__input_layernorm__weight=torch.zeros(config.hidden_size, dtype=torch.int8))
    model = Pangu(config, seed=1)
    before = {name: array.copy() for name, array in weights_by_name(model).items()}
    with pytest.raises(ValueError) as error:
        load_weights(model, path)
    lines = str(error.value).splitlines()
    hidden, ffn = config.hidden_size, config.intermediate_size
    assert str(path) in lines[0]
    assert sorted(line.strip() for line in lines[1:]) == sorted([
        f"model.norm.weight is missing: expected shape [{hidden}].",
        f"model.layers.0.self_attn.o_proj.bias is missing: expected shape [{hidden}].",
        "model.layers.0.mlp.up_proj.bias with shape [4] is unknown: expected no such tensor.",
        "model.layers.99.mlp.up_proj.weight with shape [2, 3] is unknown: expected no such tensor.",
        f"model.layers.0.mlp.down_proj.weight has shape [{ffn}, {hidden}]: expected [{hidden}, {ffn}].",
        "model.layers.0.input_layernorm.weight has dtype I8: expected one of ['F32', 'F16', 'BF16'].",
    ])
    for name, array in weights_by_name(model).items():
        assert np.array_equal(array, before[name])


def test_weights_of_another_model_of_the_same_shapes_are_refused(folder):
    config, path = folder
    fields = {key: getattr(config, key) for key in config.__dataclass_fields__}
    fields |= {"num_heads": config.num_heads * 2, "num_kv_heads": config.num_kv_heads * 2,
               "head_dim": config.head_dim // 2, "rope_theta": 123.0}
    assert config.head_dim % 4 == 0  # so that the halved head size is even
    with pytest.raises(ValueError, match=r"(?s)model\.num_heads=.*but config\.json says.*model\.rope_theta=123\.0"):
        load_weights(Pangu(ModelConfig(**fields)), path)


@pytest.mark.parametrize("damage", ["half", "last byte", "header", "length", "empty", "pointer"])
def test_a_damaged_file_is_named(damage, folder):
    config, path = folder
    file = path / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes({"half": content[:len(content) // 2], "last byte": content[:-1],
                      "header": content[:8] + b"]" + content[9:], "length": b"\xff" * 8 + content[8:], "empty": b"",
                      "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00"}[damage])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or no safetensors file .*download or copy"):
        load_weights(Pangu(config), path)


def test_missing_folders_files_and_shards_are_named(folder, random_llama, tmp_path):
    config, path = folder
    model = Pangu(config, zero_weights=True)
    with pytest.raises(ValueError, match=r"nowhere is not a folder"):
        load_weights(model, tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"nowhere.config\.json does not exist"):
        load_model(tmp_path / "nowhere")
    (path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has neither model\.safetensors nor model\.safetensors\.index\.json"):
        load_weights(model, path)
    random_llama(config, 0).save_pretrained(path, max_shard_size="9KB")
    first, second, *_ = sorted(path.glob("model-*.safetensors"))
    shutil.copy(first, tmp_path / "first")
    first.unlink()
    with pytest.raises(ValueError, match=rf"lacks {first.name}, named in model\.safetensors\.index\.json"):
        load_weights(model, path)
    shutil.copy(second, first)
    with pytest.raises(ValueError, match=r"(?s)is both in model-00001-of-.* is missing: expected"):
        load_weights(model, path)
    (path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is not JSON"):
        load_weights(model, path)
    (path / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}')
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json has no weight_map"):
        load_weights(model, path)


def test_saving_does_not_touch_weights_that_are_there(folder):
    config, path = folder
    content = (path / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"holds weights already \(model\.safetensors\)"):
        save_weights(Pangu(config), path)
    with pytest.raises(ValueError, match="dtype='float16': expected float32 or bfloat16"):
        save_weights(Pangu(config), path / "new", "float16")
    assert (path / "model.safetensors").read_bytes() == content


def test_configurations_survive_config_json_and_transformers(random_config, tmp_path):
    for seed in range(6):
        config = random_config(seed)
        (tmp_path / "config.json").write_text(json.dumps(config_json(config)))
        assert read_config(tmp_path) == config
        LlamaConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"
        assert read_config(tmp_path) == config
        assert LlamaConfig.from_pretrained(tmp_path).head_dim == config.head_dim


def test_config_json_of_the_1b_reads_without_head_dim(tmp_path):
    # The published keys, written out by hand.
    (tmp_path / "config.json").write_text(json.dumps({
        "architectures": ["PanguEmbeddedForCausalLM"], "model_type": "PanguEmbedded", "hidden_size": 1536,
        "num_hidden_layers": 26, "num_attention_heads": 12, "num_key_value_heads": 6, "intermediate_size": 6144,
        "vocab_size": 153376, "hidden_act": "silu", "bias": True, "rope_theta": 4000000, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 32768, "tie_word_embeddings": True, "bos_token_id": 1, "pad_token_id": 0,
        "eos_token_id": 45892, "torch_dtype": "bfloat16"}))
    config = read_config(tmp_path)
    assert config.head_dim == 128 and config.rope_theta == 4e6 and config.eos_id == 45892
    # The tensors of the public GGUF.
    assert len({name for parts in hugging_face_names(config).values() for name, _ in parts}) == 26 * 13 + 2


@pytest.mark.parametrize(("key", "value", "message"), [
    ("bias", False, "bias=false: expected true"),
    ("attention_bias", False, "attention_bias=false: expected true"),
    ("mlp_bias", True, "mlp_bias=true: expected false"),
    ("hidden_act", "gelu", 'hidden_act="gelu": expected "silu"'),
    ("rope_scaling", {"rope_type": "yarn"}, 'rope_scaling={"rope_type": "yarn"}: expected null'),
    ("model_type", "granite", 'model_type="granite": expected "PanguEmbedded" or "llama"'),
    ("num_attention_heads", "4", 'num_attention_heads="4": expected an integer of at least 1'),
    ("num_key_value_heads", 1.5, "num_key_value_heads=1.5: expected an integer of at least 1"),
    ("rope_theta", -1, "rope_theta=-1: expected a number above 0"),
    ("eos_token_id", [1, 2], "eos_token_id=[1, 2]: expected a token id"),
    ("num_key_value_heads", 5, "model.num_heads=4 is not a multiple of model.num_kv_heads=5"),
])
def test_a_config_json_that_means_another_model_is_refused(key, value, message, tmp_path):
    good = config_json(ModelConfig(hidden_size=32, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=64,
                                   intermediate_size=64, max_seq_len=64, eos_id=2))
    (tmp_path / "config.json").write_text(json.dumps(good | {key: value}))
    with pytest.raises(ValueError) as error:
        read_config(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value) and message in str(error.value)


def test_one_error_lists_every_missing_key(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError) as error:
        read_config(tmp_path)
    for key in ("hidden_act", "bias", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                "intermediate_size", "vocab_size", "max_position_embeddings", "rope_theta", "rms_norm_eps",
                "tie_word_embeddings", "bos_token_id", "eos_token_id"):
        assert f"{key} is missing: expected" in str(error.value)
    (tmp_path / "config.json").write_text("<html>")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        read_config(tmp_path)


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_a_frozen_model_in_bfloat16_computes_with_the_rounded_weights(folder, stored, tmp_path):
    config, path = folder
    save_weights(load_model(path), tmp_path, stored)
    frozen, rounded = load_model(tmp_path, frozen_dtype="bfloat16"), load_model(tmp_path)
    for parameter in rounded.get_parameters():
        if parameter.ndim == 2:
            ms.ops.assign(parameter, parameter.astype(ms.bfloat16).astype(ms.float32))
    tokens = Tensor(np.arange(1, 9, dtype=np.int32))
    positions, ends = Tensor(np.arange(8, dtype=np.int32)), Tensor(np.array([0, 5, 8]))
    assert not frozen.trainable_params()
    assert {parameter.dtype for parameter in frozen.get_parameters()} == {ms.float32, ms.bfloat16}
    logits, expected = (model.logits(model(tokens, positions, ends, 8)).asnumpy() for model in (frozen, rounded))
    # Where a weight is bfloat16, products round the activations too.
    np.testing.assert_allclose(logits, expected, atol=0.02 * np.abs(expected).max())
