"""The table of traffic and least times, at small sizes."""

import subprocess
import sys

import pytest

from ascend_kernels.host import roofline


def test_topk_kl_moves_its_inputs_and_outputs_and_little_else():
    for row in roofline.topk_kl_rows(num_rows=1, vocab_size=4096):
        assert row.compulsory_bytes <= row.bytes <= 1.05 * row.compulsory_bytes
        assert row.report.workspace_bytes == 0
        assert 10 * row.compulsory_bytes < row.composition_bytes


def test_packed_attention_moves_its_tensors_less_often_than_the_composition():
    rows = list(roofline.packed_attention_rows(num_tokens=300, num_heads=2, num_kv_heads=1))
    assert len(rows) == 8
    for row in rows:
        assert row.compulsory_bytes < row.bytes - row.report.workspace_bytes < row.composition_bytes
        assert row.report.cube_flops > 0


def test_decoding_reads_its_cache_once():
    for row in roofline.decode_attention_rows(num_heads=4, num_kv_heads=2):
        assert row.compulsory_bytes <= row.bytes <= 1.1 * row.compulsory_bytes


def test_times_are_the_counts_over_the_chips_peaks():
    row = next(iter(roofline.topk_kl_rows(num_rows=1, vocab_size=4096)))
    memory, with_workspace, cube, vector, composed = row.times_us()
    assert memory == with_workspace == pytest.approx(row.bytes / 1.6e6)
    assert vector == pytest.approx(row.report.vector_instructions / 72e3)
    assert (cube, composed) == (0, pytest.approx(row.composition_bytes / 1.6e6))


@pytest.mark.long
def test_command_prints_a_row_for_every_operator_and_chip():
    done = subprocess.run([sys.executable, "-m", roofline.__name__], capture_output=True, text=True, check=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("| 910b", "| 310b"))]
    assert len(lines) == 18
    assert all(line.count("|") == done.stdout.splitlines()[3].count("|") for line in lines)
