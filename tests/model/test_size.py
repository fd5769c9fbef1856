"""Counts against published numbers, and against sums written out by hand."""

import json
import subprocess
import sys
from dataclasses import fields

import pytest

from mindpangu.config import ModelConfig, recipes_folder
from mindpangu.model.size import (
    flops_per_token,
    kv_bytes_per_token,
    load_config,
    num_embedding_parameters,
    num_parameters,
)
from mindpangu.model.weights import config_json


def run(*arguments):
    return subprocess.run([sys.executable, "-m", "mindpangu.model.size", *arguments], capture_output=True, text=True,
                          check=False)


def test_parameter_counts_are_the_published_ones():
    small, large = load_config("openpangu_1b"), load_config("openpangu_7b")
    assert num_parameters(small) == 1_155_912_192
    assert num_embedding_parameters(small) == 235_585_536
    assert num_parameters(small) - num_embedding_parameters(small) == 920_326_656
    assert num_parameters(large) == 8_030_887_936
    assert kv_bytes_per_token(small) == 79_872


def test_flops_count_every_multiplication_and_addition():
    config = ModelConfig(hidden_size=6, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=2, intermediate_size=5,
                         vocab_size=11, max_seq_len=16, tie_embedding=False, eos_id=2)
    # Per token and layer: q, k, v, o, three MLP matrices; the biases and norms at one multiplication and addition each.
    layer = 2 * (6 * 8 + 8 + 2 * (6 * 4 + 4) + 8 * 6 + 6 + 3 * 6 * 5 + 2 * 6)
    head = 2 * (11 * 6 + 6)  # output projection and final norm; the input embedding is looked up
    seq_len = 7
    attention = sum(2 * 2 * 4 * 2 * num_keys for num_keys in range(1, seq_len + 1)) / seq_len  # q k^T, weights v
    assert flops_per_token(config, seq_len, backward=False) == 2 * (layer + attention) + head
    assert flops_per_token(config, seq_len) == 3 * flops_per_token(config, seq_len, backward=False)


def test_the_command_prints_the_counts_and_takes_overrides():
    shown = run("openpangu_1b", "--seq-len", "4096").stdout
    for number in ("1,155,912,192", "235,585,536", "920,326,656", "2,311,824,384", "79,872",
                   f"{6 * 1_155_912_192 + 6 * 26 * 1536 * 4097:,}"):
        assert number in shown
    assert "235,585,536" not in run("openpangu_1b", "hidden_size=1024", "head_dim=64").stdout


def test_the_command_reads_a_folder(tmp_path):
    config = load_config("openpangu_1b", ["num_layers=2"])
    (tmp_path / "config.json").write_text(json.dumps(config_json(config)))
    assert f"{235_585_536 + 2 * 35_397_120 + 1536:,}" in run(str(tmp_path)).stdout


@pytest.mark.parametrize(("arguments", "message"), [
    (["openpangu_2b"], "model 'openpangu_2b': expected a folder with config.json or one of ['openpangu_1b'"),
    (["openpangu_1b", "hiden_size=4"], "override 'hiden_size=4': expected field=value with a field of ['hidden_size'"),
    (["openpangu_1b", "num_layers=two"], "model.num_layers: Value 'two'"),
    (["openpangu_1b", "num_heads=5"], "model.num_heads=5 is not a multiple of model.num_kv_heads=6"),
    (["openpangu_1b", "--seq-len", "40000"], "--seq-len 40000: expected 1 to model.max_seq_len=32768"),
])
def test_the_command_names_what_is_wrong(arguments, message):
    result = run(*arguments)
    assert result.returncode == 1 and result.stderr.startswith("error: ") and message in result.stderr


def test_it_does_not_load_mindspore():
    code = "import sys, mindpangu.model.size; sys.exit(bool({'mindspore', 'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_recipe_lists_every_field():
    files = sorted((recipes_folder() / "model").glob("*.yaml"))
    assert {"openpangu_1b", "openpangu_7b", "tiny_student", "tiny_teacher"} <= {file.stem for file in files}
    for file in files:
        lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
        assert [line.split(":")[0] for line in lines] == [field.name for field in fields(ModelConfig)], file
