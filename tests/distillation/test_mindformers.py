"""mindformers as the teacher, against transformers in float64, and the folders that mindformers itself loads.

mindformers is imported by one process for all tests, this file run as a program: importing it takes 5 s.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mindpangu.config import ModelConfig
from mindpangu.data.batches import tokenized_to_samples
from mindpangu.data.shards import read_shard
from mindpangu.distillation.cache import decode_topk

# eps and the base of the rotary embedding are such that other values would be seen through the tolerance.
SIZES = {"hidden_size": 24, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "intermediate_size": 40, "vocab_size": 60,
         "max_seq_len": 32, "rope_theta": 100.0, "rms_norm_eps": 0.01, "eos_id": 2}
CONFIGS = {"untied": ModelConfig(**SIZES, num_layers=2, tie_embedding=False),
           "tied": ModelConfig(**SIZES, num_layers=1, tie_embedding=True)}
LENGTHS = [3, 16, 9, 2, 5, 16, 7, 4, 11, 6, 2, 13, 8, 16]  # 8 rows or so: several calls
ARGUMENTS = {"top_k": 4, "row_len": 16, "num_rows": 2, "chunk_size": 5}
# mindformers hands attention its operands in float16, and its output projection gives float16: 11 bits.
ATOL = 4e-3


def _samples(lengths=LENGTHS):
    random = np.random.default_rng(0)
    tokenized = []
    for length in lengths:
        is_target = np.ones(length, bool)
        is_target[0] = False
        tokenized.append((random.integers(0, SIZES["vocab_size"], length), is_target))
    return tokenized


@pytest.fixture(scope="module")
def teachers(random_llama, tmp_path_factory):
    """{name: (transformers' model, its folder)}"""
    folder = tmp_path_factory.mktemp("teachers")
    found = {}
    for name, config in CONFIGS.items():
        llama = random_llama(config, 0)  # logits with a standard deviation of about 1
        llama.save_pretrained(folder / name)
        found[name] = llama, folder / name
    return found


@pytest.fixture(scope="module")
def program(teachers, tmp_path_factory, pytestconfig):
    """What this file, run as a program, found: (its JSON line, {name: array}, its working directory)."""
    folder = tmp_path_factory.mktemp("program")
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, __file__, pytestconfig.getoption("--cpu-level") or "",
                           str(next(iter(teachers.values()))[1].parent)], cwd=folder, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(root)})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout, dict(np.load(folder / "arrays.npz")), folder


def _full_logprobs(llama):
    """[num_targets, V] float64, every sample by itself, and the labels."""
    rows, labels, double = [], [], llama.double()
    for tokens, is_target in _samples():
        with torch.no_grad():
            logits = double(torch.tensor(tokens[None])).logits[0]
        rows.append(torch.log_softmax(logits, -1).numpy()[:-1])
        labels.append(tokens[is_target])
    return np.concatenate(rows), np.concatenate(labels)


@pytest.mark.parametrize("name", CONFIGS)
def test_top_k_and_labels_are_those_of_transformers(program, teachers, name):
    expected, labels = _full_logprobs(teachers[name][0])
    ids, logprobs, label_logprobs = (program[1][f"{name}_{what}"] for what in ("ids", "logprobs", "labels"))
    assert (ids.dtype, logprobs.dtype, label_logprobs.dtype) == (np.int32, np.float32, np.float32)
    np.testing.assert_allclose(logprobs, np.take_along_axis(expected, ids.astype(int), -1), rtol=0, atol=ATOL)
    np.testing.assert_allclose(label_logprobs, expected[np.arange(len(labels)), labels], rtol=0, atol=ATOL)
    order = np.argsort(-expected, -1)[:, :5]
    sure = np.diff(-np.take_along_axis(expected, order, -1), axis=-1) > 2 * ATOL  # [N, 4]: before the next one
    known = sure & np.pad(sure, ((0, 0), (1, 0)), constant_values=True)[:, :4]  # and after the one before
    assert known.mean() > 0.9 and (ids == order[:, :4])[known].all()


def test_a_document_does_not_depend_on_what_is_packed_beside_it(program):
    alone, packed = program[1]["untied_alone"], program[1]["untied_labels"]
    # The same sums in float32, in blocks of other sizes: what that changes can tip an operand's rounding to float16.
    np.testing.assert_allclose(alone, packed, rtol=0, atol=ATOL / 4)


def test_mindformers_loads_a_converted_folder_as_the_parameters_that_the_annotator_has(program):
    found = json.loads(program[0])
    for name, config in CONFIGS.items():
        listed = found[name]
        assert len(listed["parameters"]) == 2 + 8 * config.num_layers + (not config.tie_embedding)
        assert listed["parameters"] == listed["converted"]
        assert listed["loaded_differ"] == [] and listed["bfloat16_differ"] == []


def test_the_layouts_are_those_of_mindformers_own_converters(program):
    assert json.loads(program[0])["converters_differ"] == []


def test_a_sample_longer_than_a_row_is_refused(program):
    assert "1 of 2 samples are longer, the longest sample has 17 tokens" in json.loads(program[0])["long"]


def test_a_recipe_annotates_by_mindformers_what_it_annotates_by_itself(smoke, tmp_path):
    shutil.copytree(smoke[0] / "runs", tmp_path / "runs", symlinks=True)
    done = subprocess.run([sys.executable, "-m", "mindpangu.annotate", "scale=smoke", "kd.engine=mindformers"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    known = {path.name for path in smoke[0].glob("runs/annotations-*")}
    (ours,) = [path for path in tmp_path.glob("runs/annotations-*") if path.name not in known]
    (builtin,) = [path for path in smoke[0].glob("runs/annotations-*") if len(list(path.glob("*.shard"))) == 3]
    for file in sorted(builtin.glob("*.shard")):
        one, other = read_shard(ours / file.name), read_shard(file)
        assert (one["tokens"] == other["tokens"]).all()
        one, other = (decode_topk({name[5:]: array for name, array in arrays.items() if name.startswith("topk.")})[1]
                      for arrays in (one, other))
        # The codec's step near the top is 1/64 nat.
        np.testing.assert_allclose(one, other, rtol=0, atol=0.05)
        assert np.abs(one - other).mean() < ATOL


def test_nothing_of_mindformers_is_left_in_the_working_directory_or_the_terminal(program):
    stdout, _, folder = program
    assert len(stdout.splitlines()) == 1 and [file.name for file in folder.iterdir()] == ["arrays.npz"]


def test_what_cannot_be_a_teacher_is_said_before_mindformers_is_imported(teachers, mindspore_cpu, tmp_path):
    from mindpangu.distillation.mindformers import MindformersAnnotator

    folder = teachers["untied"][1]
    with pytest.raises(ValueError, match="nowhere/config.json does not exist"):
        MindformersAnnotator(tmp_path / "nowhere", **ARGUMENTS)
    with pytest.raises(ValueError, match="kd.top_k=61 exceeds the teacher's vocabulary of 60"):
        MindformersAnnotator(folder, **ARGUMENTS | {"top_k": 61})
    with pytest.raises(ValueError, match="its layers run in graphs alone; use run.mode=graph"):
        MindformersAnnotator(folder, **ARGUMENTS, mode="eager")
    with pytest.raises(ValueError, match="no SiLU for it; use float32"):
        MindformersAnnotator(folder, **ARGUMENTS, precision="bfloat16")
    with pytest.raises(ValueError, match="precision='float16' with mindformers as the teacher: expected one of"):
        MindformersAnnotator(folder, **ARGUMENTS, precision="float16")
    keys = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(keys | {"intermediate_size": 41}))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"mlp.gate_proj.weight has shape \[40, 24\]: expected \[41, 24\]"):
        MindformersAnnotator(tmp_path, **ARGUMENTS)
    assert "mindformers" not in sys.modules


def _main(level, folder):
    os.environ.update(GLOG_v="3")
    from mindpangu.ops.cpu import build

    build.load(build.build(level or None, say=lambda text: None), num_threads=2)
    import mindspore as ms

    ms.set_device("CPU")
    import tempfile

    from mindpangu.distillation.mindformers import GptDecoder, MindformersAnnotator
    from mindpangu.model.mindformers import convert_to_mindformers
    from mindpangu.model.weights import open_weights, stored_bits

    result, arrays, converted = {"converters_differ": []}, {}, {}
    for name, config in CONFIGS.items():
        source = Path(folder) / name
        annotator = MindformersAnnotator(source, **ARGUMENTS)
        for what, array in zip(("ids", "logprobs", "labels"),
                               annotator.top_logprobs(tokenized_to_samples(_samples())), strict=True):
            arrays[f"{name}_{what}"] = array
        if name == "untied":
            arrays["untied_alone"] = np.concatenate(
                [annotator.top_logprobs(tokenized_to_samples([sample]))[2] for sample in _samples()])
            try:
                annotator.top_logprobs(tokenized_to_samples(_samples([3, 17])))
            except ValueError as error:
                result["long"] = str(error)
        decoder, empty = GptDecoder(config, source, "float32"), GptDecoder(config, source, "float32")
        parameters = {parameter.name: parameter for parameter in decoder.gpt.get_parameters()}
        for parameter in empty.gpt.get_parameters():
            parameter.set_data(ms.Tensor(np.full(parameter.shape, np.nan, np.float32)))
        with tempfile.TemporaryDirectory() as temporary:
            convert_to_mindformers(source, Path(temporary) / "mf")
            from mindformers.checkpoint.checkpoint import load_checkpoint
            from safetensors.numpy import load_file

            load_checkpoint(str(Path(temporary) / "mf"), empty.gpt)
            converted = load_file(Path(temporary) / "mf" / "model-0000000-0000001.safetensors")
        half = GptDecoder(config, source, "bfloat16").gpt.get_parameters()
        result[name] = {
            "parameters": {name: list(parameter.shape) for name, parameter in sorted(parameters.items())},
            "converted": {name: list(array.shape) for name, array in sorted(converted.items())},
            "loaded_differ": [p.name for p in empty.gpt.get_parameters()
                              if not np.array_equal(p.asnumpy(), parameters[p.name].asnumpy())
                              or not np.array_equal(p.asnumpy(), converted[p.name])],
            "bfloat16_differ": [p.name for p in half if p.dtype != ms.bfloat16 or not np.array_equal(
                p.asnumpy().astype(np.float32),
                torch.tensor(converted[p.name]).bfloat16().float().numpy())]}

    from mindformers.checkpoint.converter.convert_op import ConcatConvertOp, QKVConvertOp

    config, mf, layer = CONFIGS["tied"], "decoder.layers.0.", "model.layers.0."
    stored = open_weights(config, Path(folder) / "tied")
    qkv = QKVConvertOp([f"{layer}self_attn.{x}_proj.weight" for x in "qkv"], f"{mf}self_attention.linear_qkv.weight")
    qkv.num_attention_heads, qkv.num_query_groups = config.num_heads, config.num_kv_heads
    qkv.kv_channels, qkv.hidden_size = config.head_dim, config.hidden_size
    qkv.tensor_model_parallel_size = qkv.optimizer_parallel_size = 1
    fc1 = ConcatConvertOp([f"{layer}mlp.{x}_proj.weight" for x in ("gate", "up")], f"{mf}mlp.linear_fc1.weight")
    for operation in (qkv, fc1):
        for name, array in operation({part: stored_bits(stored[part]) for part in operation.hf_names}).items():
            if not np.array_equal(array, converted[name]):
                result["converters_differ"].append(name)
    np.savez("arrays.npz", **arrays)
    print(json.dumps(result))


if __name__ == "__main__":
    _main(*sys.argv[1:])
