"""The latency model against the seven published measurements, and by hand."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from mindpangu.tools import edge_latency
from mindpangu.tools.devices import load_device

from mindpangu.model.size import load_config

PAPERS = Path(__file__).resolve().parents[3] / "shared/papers/tables"
# openPangu Embedded-1B report: all rows of tables 1 (Atlas 200I A2) and 9 (Atlas 300I DUO, one chip). float16, batch 1,
# 1024 tokens in, 256 out. The heads have 128 values, 64 in the real Llama3.2-1B with its 32 heads, which is as much.
PUBLISHED = {
    ("p1_t1.csv", "Qwen2.5-1.5B"): (28, 151936, 1536, 12, 2, 8960, 2171, 178),
    ("p1_t1.csv", "Qwen3-1.7B"): (28, 151936, 2048, 16, 8, 6144, 3243, 213),
    ("p1_t1.csv", "openPangu Embedded-1B"): (26, 153376, 1536, 12, 6, 6144, 1834, 156),
    ("p1_t9.csv", "Qwen3-0.6B"): (28, 151936, 1024, 16, 8, 3072, 173, 62),
    ("p1_t9.csv", "Llama3.2-1B"): (16, 128256, 2048, 16, 8, 8192, 151, 41),
    ("p1_t9.csv", "Qwen3-1.7B"): (28, 151936, 2048, 16, 8, 6144, 247, 76),
    ("p1_t9.csv", "openPangu Embedded-1B"): (26, 153376, 1536, 12, 6, 6144, 149, 62),
}
DEVICES = {"p1_t1.csv": "atlas_200i_a2", "p1_t9.csv": "atlas_300i_duo"}
SHAPE = ("num_layers", "vocab_size", "hidden_size", "num_heads", "num_kv_heads", "intermediate_size")


def _case(row):
    *shape, ttft_ms, tpot_ms = PUBLISHED[row]
    overrides = [f"{name}={value}" for name, value in zip(SHAPE, shape, strict=True)]
    config = load_config("openpangu_1b", overrides)
    return edge_latency.measure(config, 1024, 256), load_device(DEVICES[row[0]]), config.num_layers, ttft_ms, tpot_ms


def run(*arguments):
    return subprocess.run([sys.executable, "-m", "mindpangu.tools.edge_latency", *arguments], capture_output=True,
                          text=True, env={"COLUMNS": "200"})


@pytest.mark.skipif(not PAPERS.is_dir(), reason="the papers' tables are not here")
def test_the_numbers_here_are_those_of_the_papers_tables():
    columns = ("layers", "vocab", "hidden", "q_heads", "kv_heads", "ffn", "ttft_ms", "tpot_ms")
    tables = {(file, row["model"]): tuple(int(row[column]) for column in columns)
              for file in DEVICES for row in csv.DictReader((PAPERS / file).open(encoding="utf-8"))}
    assert tables == PUBLISHED


@pytest.mark.parametrize("row", PUBLISHED, ids=" ".join)
def test_time_per_token_is_the_published_one_to_10_percent(row):
    load, device, num_layers, _, tpot_ms = _case(row)
    assert edge_latency.tpot_ms(load, device, num_layers) == pytest.approx(tpot_ms, rel=0.10)


@pytest.mark.parametrize("row", PUBLISHED, ids=" ".join)
def test_the_published_time_to_the_first_token_lies_in_the_band(row):
    load, device, num_layers, ttft_ms, _ = _case(row)
    low, high = edge_latency.ttft_band_ms(load, device, num_layers)
    assert low <= ttft_ms <= high
    assert high / low == pytest.approx(1.25 / 0.75)


@pytest.mark.parametrize("row", PUBLISHED, ids=" ".join)
def test_bounds_are_below_the_published_times(row):
    load, device, _, ttft_ms, tpot_ms = _case(row)
    assert 0 < edge_latency.ttft_bound_ms(load, device) < ttft_ms
    assert 0 < edge_latency.tpot_bound_ms(load, device) < tpot_ms


def test_the_load_of_openpangu_1b_is_that_worked_out_by_hand():
    config = load_config("openpangu_1b")
    load = edge_latency.measure(config, 1024, 256)
    assert load.weight_bytes == 2_311_824_384
    assert load.kv_bytes == 79_872 * 1152
    assert load.decode_flops == 2 * 1_155_912_192 + 26 * 4 * 1536 * 1152
    # Without the output projection at every position, with it at the last one; 1 + 2 + ... + 1024 keys.
    layers = 1024 * 2 * 920_326_656 + 26 * 4 * 1536 * (1024 * 1025 // 2)
    assert load.prefill_flops == layers + 2 * 153_376 * 1536
    halved = edge_latency.measure(config, 1024, 256, weight_bits=8, kv_bits=4)
    assert (halved.weight_bytes, halved.kv_bytes) == (load.weight_bytes / 2, load.kv_bytes / 4)
    untied = edge_latency.measure(load_config("openpangu_1b", ["tie_embedding=false"]), 1024, 256)
    assert untied == load, "a separate input embedding is looked up, not read"


def test_what_would_help_follows_from_bytes_and_launches():
    config, device = load_config("openpangu_1b"), load_device("atlas_200i_a2")
    (_, present), *changes = edge_latency.improvements(config, device, 1024, 256)
    times = dict(changes)
    assert times["weights in int8"] == pytest.approx(present - 2_311_824_384 / 2 / 25.6e6)
    assert times["half the launches"] == pytest.approx(present - 1.98 * 26 / 2)
    load = edge_latency.measure(config, 1024, 256)
    assert times["no launch costs time"] == pytest.approx(edge_latency.tpot_bound_ms(load, device))
    assert [time for _, time in changes] == sorted(times.values())


def test_the_command_takes_overrides_and_a_users_device(tmp_path):
    shown = run("openpangu_1b").stdout
    for expected in ("2,311.8", "145.4", "93.9", "TTFT +-25%", "What would help", "weights in int8"):
        assert expected in shown
    file = tmp_path / "mine.yaml"
    file.write_text("my_board: {tflops: 8, memory_gib: 1, memory_gbs: 51.2}\n")
    shown = run("openpangu_1b", "num_layers=2", "--devices", str(file), "--device", "my_board").stdout
    assert "51.2 GB/s, 8 TFLOPS" in shown and "only bounds" in shown and "does not fit" not in shown
    assert "does not fit" in run("openpangu_1b", "--devices", str(file), "--device", "my_board").stdout


@pytest.mark.parametrize("text, complaint", [
    ("board: {tflops: 8, memory_gib: 4}", "memory_gbs is missing"),
    ("board: {tflops: 0, memory_gib: 4, memory_gbs: 5}", "tflops: 0, expected a number above 0"),
    ("board: {tflops: 8, memory_gib: 4, memory_gbs: fast}", "memory_gbs: 'fast'"),
    ("board: {tflops: 8, memory_gib: 4, memory_gbs: 5, tlops: 1}", "unknown field tlops"),
    ("board: {tflops: 8, memory_gib: 4, memory_gbs: 5, devices_per_server: 0}", "devices_per_server: 0"),
    ("board: 8", "expected fields"),
    ("other: {tflops: 8, memory_gib: 4, memory_gbs: 5}", "which has other"),
    ("board: {", "not readable as YAML"),
])
def test_a_wrong_file_of_devices_is_refused_with_what_is_wrong(tmp_path, text, complaint):
    file = tmp_path / "devices.yaml"
    file.write_text(text)
    done = run("openpangu_1b", "--devices", str(file), "--device", "board")
    assert done.returncode == 1 and done.stderr.startswith("error: ") and complaint in done.stderr
    assert str(file) in done.stderr


@pytest.mark.parametrize("arguments, complaint", [
    (["openpangu_1b", "--device", "atlas_900"], "atlas_200i_a2"),
    (["openpangu_2b"], "openpangu_1b"),
    (["openpangu_1b", "--prompt-len", "32768"], "max_seq_len=32768"),
    (["openpangu_1b", "--output-len", "0"], "at least 1"),
    (["openpangu_1b", "layers=2"], "num_layers"),
])
def test_bad_arguments_are_refused_with_what_is_possible(arguments, complaint):
    done = run(*arguments)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and complaint in done.stderr
