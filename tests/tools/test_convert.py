"""Folders in mindformers' form: the layout written out by hand, and the way back to the bit.

That mindformers itself loads them is in tests/distillation/test_mindformers.py.
"""

import json
import shutil
import tracemalloc

import pytest
import torch
from mindpangu.tools.convert import main
from safetensors.torch import load_file, save_file

from mindpangu.config import ModelConfig

TIED, UNTIED = 2, 1  # seeds of random_config: 4 and 2 query heads per key/value head


@pytest.fixture
def make_folder(random_config, random_llama, tmp_path):
    """(seed, dtype) -> ModelConfig and the folder "source", as transformers saves it, with a tokenizer."""

    def make(seed, dtype=torch.float32, **keywords):
        config = random_config(seed)
        random_llama(config, seed).to(dtype).save_pretrained(tmp_path / "source", **keywords)
        (tmp_path / "source" / "tokenizer.model").write_bytes(b"pieces")
        return config, tmp_path / "source"

    return make


def load(folder):
    """All tensors of a folder's files, and the files' names."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}, [file.name for file in files]


def bits(tensor):
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(bits(found[name]), bits(tensor)), name


def in_mindformers_layout(config, theirs):
    """GPTModel's parameters, row by row, of a Hugging Face state dict."""
    named = {"embedding.word_embeddings.weight": theirs["model.embed_tokens.weight"],
             "decoder.final_layernorm.weight": theirs["model.norm.weight"]}
    if not config.tie_embedding:
        named["output_layer.weight"] = theirs["lm_head.weight"]
    for i in range(config.num_layers):
        old, new, head_dim = f"model.layers.{i}.", f"decoder.layers.{i}.", config.head_dim
        for kind in ("weight", "bias"):
            q, k, v = (theirs[f"{old}self_attn.{x}_proj.{kind}"].split(head_dim) for x in "qkv")
            group, rows = config.num_heads // config.num_kv_heads, []
            for head in range(config.num_kv_heads):
                rows += [*q[head * group:(head + 1) * group], k[head], v[head]]
            named[f"{new}self_attention.linear_qkv.{kind}"] = torch.cat(rows)
            named[f"{new}self_attention.linear_proj.{kind}"] = theirs[f"{old}self_attn.o_proj.{kind}"]
        rows = zip(theirs[f"{old}mlp.gate_proj.weight"], theirs[f"{old}mlp.up_proj.weight"], strict=True)
        named[f"{new}mlp.linear_fc1.weight"] = torch.stack([row for pair in rows for row in pair])
        named[f"{new}mlp.linear_fc2.weight"] = theirs[f"{old}mlp.down_proj.weight"]
        named[f"{new}input_layernorm.weight"] = theirs[f"{old}input_layernorm.weight"]
        named[f"{new}pre_mlp_layernorm.weight"] = theirs[f"{old}post_attention_layernorm.weight"]
    return named


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", [TIED, UNTIED])
def test_weights_come_back_to_the_bit_and_lie_in_between_as_mindformers_has_them(make_folder, tmp_path, capsys, seed,
                                                                                dtype):
    config, source = make_folder(seed, dtype)
    main(["mindformers", str(source), str(tmp_path / "mf")])
    theirs, _ = load(source)
    ours, files = load(tmp_path / "mf")
    assert_same_bits(ours, in_mindformers_layout(config, theirs))
    assert files == ["model-0000000-0000001.safetensors"]  # with model.safetensors mindformers would expect other names
    main(["hugging_face", str(tmp_path / "mf"), str(tmp_path / "back")])
    back, files = load(tmp_path / "back")
    assert_same_bits(back, theirs)
    assert files == ["model.safetensors"]
    for name in ("config.json", "generation_config.json", "tokenizer.model"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    assert capsys.readouterr().out.split() == [str(tmp_path / "mf"), str(tmp_path / "back")]


def test_shards_are_read_and_written_both_ways(make_folder, tmp_path):
    config, source = make_folder(UNTIED, max_shard_size="20KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    small = ["--max-shard-gib", str(2e4 / 2**30)]
    main(["mindformers", str(source), str(tmp_path / "mf"), *small])
    main(["hugging_face", str(tmp_path / "mf"), str(tmp_path / "back"), *small])
    theirs, _ = load(source)
    ours, names = load(tmp_path / "mf")
    assert_same_bits(ours, in_mindformers_layout(config, theirs))
    assert len(names) > 2 and names[-1] == f"model-{len(names) - 1:07d}-{len(names):07d}.safetensors"
    back, names = load(tmp_path / "back")
    assert_same_bits(back, theirs)
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index.values()) == set(names) and index.keys() == theirs.keys()


def test_a_checkpoint_of_a_training_by_mindformers_becomes_a_model_of_the_folder_it_started_from(make_folder, tmp_path):
    config, source = make_folder(UNTIED, torch.bfloat16)
    theirs = {name: tensor.float() + 1 for name, tensor in load(source)[0].items()}  # it trains in float32
    trained = tmp_path / "iteration_00000010"
    trained.mkdir()
    save_file(in_mindformers_layout(config, theirs), trained / "qwen-model-0000000-0000001.safetensors")
    save_file({"adam_m.output_layer.weight": torch.zeros(3)}, trained / "qwen-opt-0000000-0000001.safetensors")
    (trained / "metadata.json").write_text("{}")
    main(["hugging_face", str(trained), str(tmp_path / "back"), "--config", str(source)])
    assert_same_bits(load(tmp_path / "back")[0], theirs)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "back"))
    assert before["dtype"] == "bfloat16" and after == before | {"dtype": "float32"}
    assert not (tmp_path / "back" / "metadata.json").exists()


def test_memory_is_that_of_a_parameter_and_not_of_the_model(random_llama, tmp_path):
    config = ModelConfig(hidden_size=128, num_layers=24, num_heads=4, num_kv_heads=2, head_dim=32, vocab_size=256,
                         intermediate_size=512, max_seq_len=64, rope_theta=1e4, tie_embedding=True, eos_id=2)
    random_llama(config, 0).save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "tokenizer.model").write_bytes(b"pieces")
    total = (tmp_path / "source" / "model.safetensors").stat().st_size
    largest = 2 * 512 * 128 * 4
    assert total > 40 * largest
    for arguments in (["mindformers", "source", "mf"], ["hugging_face", "mf", "back"]):
        tracemalloc.start()
        main([arguments[0], *(str(tmp_path / name) for name in arguments[1:])])
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 4 * largest, f"{arguments}: {peak / largest:.1f} times the largest parameter"


def _fails(*arguments):
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return str(stopped.value)


def test_what_cannot_be_converted_is_said_and_nothing_is_written(make_folder, tmp_path):
    config, source = make_folder(UNTIED)
    out = tmp_path / "out"
    assert "nowhere: expected a run folder with a checkpoint" in _fails("mindformers", tmp_path / "nowhere", out)
    assert "nowhere is not a folder" in _fails("hugging_face", tmp_path / "nowhere", out)
    assert "--config belongs to hugging_face" in _fails("mindformers", source, out, "--config", source)
    assert "has no *model-*.safetensors" in _fails("hugging_face", source, out)

    mf = tmp_path / "mf"
    main(["mindformers", str(source), str(mf)])
    assert f"{mf} is there already: choose another folder" in _fails("mindformers", source, mf)
    (mf / "config.json").rename(tmp_path / "config.json")
    assert "has no config.json" in _fails("hugging_face", mf, out)
    (tmp_path / "config.json").rename(mf / "config.json")

    name = "decoder.layers.0.mlp.linear_fc1.weight"
    file = mf / "model-0000000-0000001.safetensors"
    save_file(load_file(file) | {name: torch.zeros(3, 5), "surplus": torch.zeros(2)}, file)
    said = _fails("hugging_face", mf, out)
    assert f"{name} has shape [3, 5]: expected [{2 * config.intermediate_size}, {config.hidden_size}]" in said
    assert "surplus with shape [2] is unknown" in said
    shutil.copyfile(file, mf / "model-0000001-0000002.safetensors")
    said = _fails("hugging_face", mf, out)
    assert f"{name} is both in" in said and "has to be merged first" in said

    state = load_file(source / "model.safetensors")
    state["model.layers.0.self_attn.k_proj.bias"] = state["model.layers.0.self_attn.k_proj.bias"].half()
    save_file(state, source / "model.safetensors")
    said = _fails("mindformers", source, out)
    assert "k_proj.bias" in said and "have the types ['F16', 'F32']: expected one" in said
    assert not out.exists()


def test_a_size_of_files_that_is_none_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["mindformers", "a", "b", "--max-shard-gib", "0"])
    assert "--max-shard-gib 0: expected a positive number" in capsys.readouterr().err
