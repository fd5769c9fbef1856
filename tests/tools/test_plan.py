"""Sums by hand, the papers' stages, and what the plan warns of."""

import re
import subprocess
import sys

import pytest
from mindpangu.tools.devices import Device, load_device
from mindpangu.tools.plan import STAGES, Plan, evaluate, parse

from mindpangu.model.memory import training_memory
from mindpangu.model.size import load_config

ONE_B = load_config("openpangu_1b")
# Round numbers: 100 TFLOPS at mfu 0.5 are 5e13 FLOPs a second.
DEVICE = Device(tflops=100, memory_gib=64, memory_gbs=1000, server_gbs=100, network_gbs=10, devices_per_server=4)


def run(*arguments):
    return subprocess.run([sys.executable, "-m", "mindpangu.tools.plan", *arguments], capture_output=True, text=True,
                          env={"COLUMNS": "200"})


def _plan(**values):
    return Plan(**{"mfu": 0.5, "devices": 8, "seq_len": 4096, "batch_tokens": 64 * 4096, "shard": "none"} | values)


def _warnings(**values):
    return " ".join(evaluate(_plan(**values), ONE_B, DEVICE).warnings)


def test_the_time_of_a_step_is_the_sum_worked_out_by_hand():
    result = evaluate(_plan(), ONE_B, DEVICE)
    assert (result.rows_per_step, result.data_ranks, result.micro_batches, result.micro_batch_rows) == (64, 8, 8, 1)
    flops = 6 * 1_155_912_192 + 6 * 26 * 1536 * 4097
    assert result.compute_s == pytest.approx(8 * 4096 * flops / 5e13)
    # Weights, two moments and gradients read, the first three written: 7 arrays of 4 bytes.
    assert result.update_s == pytest.approx(28 * 1_155_912_192 / 1e12)
    # There and back: 3/4 of all sums inside a server of 4, then half of a quarter between two servers.
    num_bytes = 4 * 1_155_912_192
    assert result.exchange_s == pytest.approx(2 * (num_bytes * 3 / 4 / 100e9 + num_bytes / 4 / 2 / 10e9))
    assert result.step_s == pytest.approx(result.compute_s + result.update_s + result.exchange_s)
    assert result.warnings == []


def test_what_changes_the_time_changes_it_by_its_part():
    plain = evaluate(_plan(), ONE_B, DEVICE)
    assert evaluate(_plan(shard="optimizer"), ONE_B, DEVICE).update_s == pytest.approx(plain.update_s / 8)
    # Sums of gradients after each of 8 micro-batches, weights back once.
    sums = evaluate(_plan(shard="gradients"), ONE_B, DEVICE)
    assert sums.exchange_s == pytest.approx(plain.exchange_s / 2 * 9)
    assert evaluate(_plan(mfu=0.25), ONE_B, DEVICE).compute_s == pytest.approx(2 * plain.compute_s)
    # Of the forward pass all but the output projection runs once more.
    forward = 2 * 1_155_912_192 + 2 * 26 * 1536 * 4097
    again = evaluate(_plan(recompute=True), ONE_B, DEVICE).compute_s / plain.compute_s
    assert again == pytest.approx(1 + (forward - 2 * 153_376 * 1536) / (3 * forward))
    short = evaluate(_plan(document_len=1024), ONE_B, DEVICE).compute_s / plain.compute_s
    assert short == pytest.approx((6 * 1_155_912_192 + 6 * 26 * 1536 * 1025) / (3 * forward))


def test_sequence_parallel_shares_rows_and_sends_heads():
    split = evaluate(_plan(sequence_parallel=2), ONE_B, DEVICE)
    assert (split.data_ranks, split.micro_batches) == (4, 16)
    plain = evaluate(_plan(), ONE_B, DEVICE)
    assert split.compute_s == pytest.approx(plain.compute_s)
    # 36 heads of 128 in bfloat16, of 2048 tokens, 26 layers, 16 micro-batches, forward and backward; half of it leaves.
    sent = 2048 * 36 * 128 * 2 * 26 * 16 * 2 / 2
    assert split.exchange_s - plain.exchange_s == pytest.approx(sent / 100e9)
    assert split.memory == training_memory(ONE_B, 4096, num_micro_batches=16, num_ranks=8, shard="none",
                                           sequence_parallel=2)


def test_a_divided_vocabulary_takes_memory_off_and_sends_hidden_states():
    plain = evaluate(_plan(sequence_parallel=2), ONE_B, DEVICE)
    divided = evaluate(_plan(sequence_parallel=2, vocab_parallel=True), ONE_B, DEVICE)
    assert divided.memory == training_memory(ONE_B, 4096, num_micro_batches=16, num_ranks=8, shard="none",
                                             sequence_parallel=2, vocab_parallel=True)
    assert divided.memory.weights < plain.memory.weights and divided.compute_s == plain.compute_s
    # 16 micro-batches of 4096 tokens: gathered in 2 bytes, summed in 4; half comes from the other device.
    assert divided.exchange_s - plain.exchange_s == pytest.approx(16 * 4096 * 1536 * 6 / 2 / 100e9)
    assert evaluate(_plan(sequence_parallel=2, vocab_parallel=True, stage="kd_student"), ONE_B, DEVICE) == divided
    other = evaluate(_plan(sequence_parallel=2, vocab_parallel=True, stage="sft_fast"), ONE_B, DEVICE)
    assert other.memory == plain.memory and other.exchange_s == plain.exchange_s


def test_rows_are_taken_as_the_trainer_takes_them():
    # Of 8 rows a rank: 3 do not divide them, 2 do.
    assert evaluate(_plan(micro_batch_rows=3), ONE_B, DEVICE)[4:6] == (4, 2)
    assert evaluate(_plan(micro_batch_rows=100), ONE_B, DEVICE)[4:6] == (1, 8)


@pytest.mark.parametrize("values, said", [
    ({"sequence_parallel": 4}, "does not divide 12 query and 6 key/value heads"),
    ({"sequence_parallel": 4}, "possible are 1, 2, 3, 6"),
    ({"sequence_parallel": 3}, "devices=8 is not a multiple of sequence_parallel=3"),
    ({"batch_tokens": 60 * 4096}, "60 rows of a step can't be divided among 8 ranks"),
    ({"batch_tokens": 60 * 4096}, "use 4 devices"),
    ({"batch_tokens": 4 * 4096}, "have nothing to do"),
    ({"batch_tokens": 100_000}, "24 rows, 98,304 tokens"),
    ({"seq_len": 65536, "batch_tokens": 64 * 65536}, "model.max_seq_len=32768"),
    ({"moments_dtype": "bfloat16"}, "rounds the second moment"),
    ({"vocab_parallel": True}, "vocab_parallel=true with sequence_parallel=1: the trainer refuses it"),
    ({"vocab_parallel": True, "sequence_parallel": 2, "stage": "grpo"}, "vocab_parallel=true changes nothing in grpo"),
    ({"seq_len": 32768, "batch_tokens": 64 * 32768}, "does not fit"),
])
def test_what_the_trainer_refuses_or_wastes_is_said(values, said):
    assert said in _warnings(**values)


def test_a_plan_that_does_not_fit_names_the_change_that_makes_it_fit():
    said = _warnings(seq_len=32768, batch_tokens=64 * 32768)
    changes = dict(word.split("=") for word in re.search(r"It would with (.*):", said).group(1).split())
    assert changes
    # With fewer rows in a micro-batch there are several, whose sums are 8 bytes a parameter more.
    named = re.search(r"It would with micro_batch_rows=1: ([\d.]+) GiB", _warnings(micro_batch_rows=8))
    taken = evaluate(_plan(), ONE_B, DEVICE)
    assert taken.micro_batches == 8 and float(named.group(1)) == round(taken.memory.total / 2**30, 1)
    plan, _, _ = parse(["mfu=0.5", "devices=8", "seq_len=32768", f"batch_tokens={64 * 32768}", "shard=none",
                        *(f"{name}={value}" for name, value in changes.items())])
    assert "does not fit" not in " ".join(evaluate(plan, ONE_B, DEVICE).warnings)
    small = Device(tflops=100, memory_gib=4, memory_gbs=1000)
    assert "No choice" in " ".join(evaluate(_plan(), ONE_B, small).warnings)


def test_the_papers_stages_have_the_papers_tokens():
    """P1 2.2 and 4.1: 10.4T tokens of pre-training at 16M a batch, the first 4T at 4K; SFT at 4M and 2M, 32K rows."""
    pretraining = [stage for name, stage in STAGES.items() if name.startswith(("pretrain", "anneal"))]
    assert sum(stage.budget_tokens for stage in pretraining) == 10.4e12
    assert {stage.batch_tokens for stage in pretraining} == {2**24}
    assert [stage.seq_len for stage in pretraining] == [4096, 8192, 8192, 32768]
    assert (STAGES["sft_reasoning"].batch_tokens, STAGES["sft_fast"].batch_tokens) == (2**22, 2**21)
    assert STAGES["sft_fast"].seq_len == STAGES["sft_reasoning"].seq_len == 32768


@pytest.mark.parametrize("name, tflops, memory_gib", [("ascend_910b1", 363.7, 64), ("ascend_910b2", 353.9, 64),
                                                      ("ascend_910b3", 294.9, 64), ("ascend_910b4", 245.8, 32)])
def test_the_devices_have_their_chips_peaks(name, tflops, memory_gib):
    """cube cores x 16 x 16 x 16 multiplications and additions x clock, of CANN's platform_config."""
    device = load_device(name)
    assert device.tflops == pytest.approx(tflops, rel=1e-2) and device.memory_gib == memory_gib


def test_the_command_prints_a_plan_and_all_stages(tmp_path):
    shown = run("model=openpangu_1b", "devices=64", "seq_len=32768", "sequence_parallel=2", "budget_tokens=1e12").stdout
    for expected in ("4,194,304", "128 rows of 32,768: 32 ranks x 4 micro-batches", "mfu=0.4 of 295", "1e+12 tokens"):
        assert expected in shown
    shown = run("stage=all", "devices=64", "recompute=true").stdout
    for name in STAGES:
        assert name in shown
    assert "8,388,608" in shown and "days" in shown
    stage = run("stage=sft_fast", "devices=64", "seq_len=16384").stdout
    assert "128 rows of 16,384" in stage, "a value that is given counts more than the stage's"
    file = tmp_path / "mine.yaml"
    file.write_text("mine: {tflops: 10, memory_gib: 16, memory_gbs: 100}\n")
    shown = run("model.num_layers=2", "device=mine", f"file={file}", "devices=1").stdout
    assert "of 10 TFLOPS" in shown and "does not fit" not in shown


@pytest.mark.parametrize("arguments, complaint", [
    (["device=ascend_910c"], "ascend_910b3"), (["layers=3"], "'layers=3'"), (["stage=sft"], "sft_reasoning"),
    (["devices=0"], "devices=0"), (["devices=many"], "devices"), (["mfu=40"], "mfu=40"), (["reserve=1"], "reserve=1"),
    (["shard=weights"], "gradients"), (["moments_dtype=float16"], "bfloat16"), (["model=pangu"], "openpangu_1b"),
    (["model.layers=3"], "num_layers"), (["budget_tokens=-1"], "budget_tokens=-1"),
    (["document_len=8192"], "seq_len=4096"), (["devices"], "name=value"),
    (["vocab_parallel=perhaps"], "vocab_parallel"),
])
def test_bad_arguments_are_refused_with_what_is_possible(arguments, complaint):
    done = run(*arguments)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and complaint in done.stderr
    assert "Traceback" not in done.stderr


def test_help_lists_every_name():
    shown = run("--help").stdout
    for name in Plan.__dataclass_fields__:
        assert f"\n{name}: " in shown
