"""Jobs that msrun starts, with 2 and 4 processes, against one process."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mindpangu.config import load_recipe, recipes_folder
from mindpangu.data.shards import read_shard
from mindpangu.model.size import flops_per_token

BIN = Path(sys.executable).parent
TIMINGS = {"time", "tokens_per_s", "data_wait", "memory_gib", "rollout_time", "mfu", "num_tokens"}
# Few, short steps: what is compared is arithmetic, and every launch costs several seconds a process.
# Rows of an odd number of tokens: where two ranks share one, it needs a token more.
SFT = ["recipe=sft_direct", "scale=smoke", "model.num_kv_heads=2", "data.seq_len=97", "train.micro_batch_rows=1",
       "run.log_every=1"]
GRPO = ["recipe=grpo", "scale=smoke", "rollout.prompts_per_shard=4"]  # 2 shards of 8 prompts


def free_port():
    """One whose next is free too: MindSpore's scheduler and our hub."""
    while True:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            try:
                other.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


def launch(folder, size, *arguments):
    """msrun as a user starts it; its output goes to msrun.log, those of the ranks to log/."""
    command = [BIN / "msrun", f"--worker_num={size}", f"--local_worker_num={size}",
               f"--master_port={free_port()}", "--join=True", f"--log_dir={folder / 'log'}",
               "python", "-m", "mindpangu.train", *arguments]
    shutil.rmtree(folder / "log", ignore_errors=True)
    with open(folder / "msrun.log", "w") as log:
        return subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                                env=os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"})


def output(folder):
    logs = [folder / "msrun.log", *sorted(folder.glob("log/*.log"))]
    return "".join(path.read_text(errors="replace") for path in logs)


def msrun(folder, size, *arguments, code=0):
    """Run a job to its end; returns what rank 0 said."""
    process = launch(folder, size, *arguments)
    try:
        found = process.wait(600)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert (found == 0) == (code == 0), output(folder)
    return (folder / "log" / "worker_0.log").read_text(errors="replace")


def alone(folder, *arguments):
    done = subprocess.run([sys.executable, "-m", "mindpangu.train", *arguments], cwd=folder, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr


def rows(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMINGS and not name.startswith("rank/")}
            for row in lines]


def assert_same(ours, theirs):
    """The same numbers to 1e-6, relative or absolute, as sums of float32 in another order give."""
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        for name, value in mine.items():
            assert value == pytest.approx(other[name], rel=1e-6, abs=1e-6), (mine["step"], name)


def assert_same_text(ours, theirs, pattern):
    names = [path.relative_to(theirs) for path in sorted(theirs.glob(pattern))]
    assert names and [path.relative_to(ours) for path in sorted(ours.glob(pattern))] == names
    assert [(ours / name).read_text() for name in names] == [(theirs / name).read_text() for name in names]


@pytest.fixture(scope="module")
def folder(smoke, tmp_path_factory):
    """A folder with the runs of one process: SFT; the whole recipe, and GRPO after it."""
    folder = tmp_path_factory.mktemp("jobs")
    alone(folder, *SFT, "run.dir=alone", "train.steps=6")
    shutil.copytree(smoke[0] / "runs", folder / "alone_all", symlinks=True)
    alone(folder, *GRPO, "run.root=alone_all", "run.dir=alone_grpo")
    return folder


def test_two_processes_distil_and_reinforce_as_one_does(folder):
    shutil.copytree(folder / "alone_all", folder / "two_all", symlinks=True,
                    ignore=shutil.ignore_patterns("kd_student-*", "answers-*", "annotations-*"))
    said = msrun(folder, 2, *GRPO, "run.root=two_all", "run.dir=two_grpo")
    assert "rank 0 of 2" in said and said.count("kd_student: done") == 1
    (student,) = (path.name for path in (folder / "alone_all").glob("kd_student-*"))
    assert_same(rows(folder / "two_all" / student), rows(folder / "alone_all" / student))
    assert_same(rows(folder / "two_grpo"), rows(folder / "alone_grpo"))
    # Answers and their rewards are the same too.
    assert_same_text(folder / "two_grpo" / "rollouts", folder / "alone_grpo" / "rollouts", "*/*.jsonl")
    assert_same_text(folder / "two_grpo" / "samples", folder / "alone_grpo" / "samples", "*.jsonl")
    shards = [sorted(path.relative_to(folder / root) for path in (folder / root).glob("answers-*/*.shard"))
              for root in ("two_all", "alone_all")]
    assert shards[0] == shards[1] and len(shards[0]) > 3
    for path in shards[0]:
        ours, theirs = (read_shard(folder / root / path) for root in ("two_all", "alone_all"))
        assert ours["tokens"].tolist() == theirs["tokens"].tolist()
    measured = json.loads((folder / "two_grpo" / "metrics.jsonl").read_text().splitlines()[-2])
    assert measured["memory_gib"] == max(measured[f"rank/{rank}/memory_gib"] for rank in range(2))


@pytest.mark.long
def test_four_processes_that_share_rows_and_gradients_train_as_one_does_and_others_resume(folder):
    arguments = [*SFT, "train.steps=6", "run.dir=four", "run.save_every=2", "run.shard=gradients"]
    msrun(folder, 4, *arguments, "run.sequence_parallel=2", "run.recompute=true", "run.peak_tflops=0.25")
    assert_same(rows(folder / "four"), rows(folder / "alone"))
    recipe = load_recipe(SFT)
    flops = flops_per_token(recipe.model, recipe.data.seq_len)
    measured = json.loads((folder / "four" / "metrics.jsonl").read_text().splitlines()[-2])
    assert measured["mfu"] == pytest.approx(measured["tokens_per_s"] * flops / (4 * 0.25e12))
    checkpoint = folder / "four" / "checkpoints" / "step-000006"
    assert len(list(checkpoint.glob("optimizer-*-of-00004.safetensors"))) == 4
    # Back to step 4, and on with two ranks; back to step 4 of those, and on with one.
    for size in (2, 1):
        shutil.rmtree(folder / "four" / "checkpoints" / "step-000006")
        for name in ("done.json", "checkpoints/best"):
            (folder / "four" / name).unlink(missing_ok=True)
        if size == 2:
            assert "resuming at step 4 of 6" in msrun(folder, 2, *arguments, "run.shard=optimizer")
        else:
            alone(folder, *arguments)
        assert_same(rows(folder / "four"), rows(folder / "alone"))
        written = folder / "four" / "checkpoints" / "step-000006"
        assert len(list(written.glob(f"optimizer-*-of-{size:05d}.safetensors"))) == size


@pytest.mark.long
def test_three_processes_share_rows_that_three_do_not_divide(tmp_path):
    arguments = [*SFT, "model.num_heads=6", "model.num_kv_heads=3", "train.steps=4"]
    alone(tmp_path, *arguments, "run.dir=alone")
    msrun(tmp_path, 3, *arguments, "run.dir=three", "run.sequence_parallel=3")
    assert_same(rows(tmp_path / "three"), rows(tmp_path / "alone"))


@pytest.mark.long
def test_four_processes_that_share_rows_and_vocabulary_distil_and_reinforce_as_one_does(tmp_path):
    whole = [*GRPO, "model.num_kv_heads=2", "run.root=runs"]
    alone(tmp_path, *whole, "run.dir=alone_grpo")
    (student,) = (tmp_path / "runs").glob("kd_student-*")
    shared = ["run.sequence_parallel=2", "run.vocab_parallel=true"]
    msrun(tmp_path, 4, *whole, "recipe=kd_student", *shared, "run.dir=four_kd")
    assert_same(rows(tmp_path / "four_kd"), rows(student))
    said = msrun(tmp_path, 4, *whole, *shared, "run.dir=four_grpo")
    assert "rollout.prompts_per_shard=4 makes 2 shards of 8 prompts: 2 of 4 ranks have nothing to do" in said
    assert_same(rows(tmp_path / "four_grpo"), rows(tmp_path / "alone_grpo"))


def test_a_killed_rank_is_named_within_a_minute_and_the_same_command_resumes(folder):
    arguments = [*SFT, "train.steps=24", "run.dir=killed", "run.save_every=1", "run.shard=none"]
    process = launch(folder, 2, *arguments)
    try:
        deadline = time.monotonic() + 300
        while not list((folder / "killed" / "checkpoints").glob("step-*")):
            assert time.monotonic() < deadline and process.poll() is None, output(folder)
            time.sleep(0.1)
        victim = next(pid for pid in _children(process.pid) if {b"RANK_ID=1", b"MS_ROLE=MS_WORKER"} <= _variables(pid))
        began = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        assert process.wait(60) != 0
        assert time.monotonic() - began < 60
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    said = output(folder)
    assert f"rank 1 ({socket.gethostname()}, process {victim}) is gone" in said and "the same command resumes" in said
    steps = [int(path.name[5:]) for path in (folder / "killed" / "checkpoints").glob("step-*")]
    resumed = msrun(folder, 2, *arguments)
    assert int(re.search(r"resuming at step (\d+) of 24", resumed).group(1)) >= max(steps)
    found = [row["step"] for row in rows(folder / "killed") if "loss" in row]
    assert found == list(range(1, 25)), "every step once"


def _children(pid):
    """Of msrun: other jobs' ranks have the same variables."""
    return [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]


def _variables(pid):
    return set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))


def test_rows_that_cannot_be_divided_are_told(folder):
    msrun(folder, 2, *SFT, "train.steps=6", "run.dir=refused", "train.rows_per_step=3", code=1)
    assert "train.rows_per_step=3 can't be divided among 2 ranks" in output(folder)


@pytest.mark.parametrize(("script", "variables", "expected"), [
    ("devices_8.sh", {}, {"worker_num": 8, "local_worker_num": 8, "node_rank": -1, "join": True}),
    ("devices_64.sh", {"MASTER_ADDR": "10.0.0.1", "NODE_RANK": "3", "MASTER_PORT": "9000"},
     {"worker_num": 64, "local_worker_num": 8, "node_rank": 3, "master_addr": "10.0.0.1", "master_port": 9000}),
    ("devices_64.sh", {"MASTER_ADDR": "10.0.0.1", "NODE_RANK": "0", "NUM_NODES": "2", "RANK_TABLE": "a table.json"},
     {"worker_num": 16, "rank_table_file": "a table.json"}),
])
def test_launch_scripts_say_what_msrun_understands(tmp_path, monkeypatch, script, variables, expected):
    from mindspore.parallel.cluster.run import get_args

    (tmp_path / "msrun").write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done > words\n')
    (tmp_path / "msrun").chmod(0o755)
    path = recipes_folder() / "launch" / script
    subprocess.run(["sh", path, "recipe=grpo", "data.train=[a b.jsonl]"], cwd=tmp_path, check=True,
                   env=os.environ | variables | {"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    words = (tmp_path / "words").read_text().splitlines()
    monkeypatch.setattr(sys, "argv", ["msrun", *words])
    arguments = vars(get_args())
    assert {name: arguments[name] for name in expected} == expected
    assert arguments["task_script"] == "python"
    command = arguments["task_script_args"]
    assert command == ["-m", "mindpangu.train", "run=ascend_8", "recipe=grpo", "data.train=[a b.jsonl]"]


def test_the_script_for_one_device_starts_the_command_itself(tmp_path):
    (tmp_path / "python").write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done > words\n')
    (tmp_path / "python").chmod(0o755)
    subprocess.run(["sh", recipes_folder() / "launch" / "devices_1.sh", "recipe=grpo", "data.train=[a b.jsonl]"],
                   cwd=tmp_path, check=True, env={"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert (tmp_path / "words").read_text().splitlines() == ["-m", "mindpangu.train", "run=ascend", "recipe=grpo",
                                                             "data.train=[a b.jsonl]"]


def test_the_script_for_several_machines_asks_for_what_it_needs(tmp_path):
    done = subprocess.run(["sh", recipes_folder() / "launch" / "devices_64.sh"], capture_output=True, text=True,
                          env={"PATH": os.environ["PATH"]}, cwd=tmp_path)
    assert done.returncode and "MASTER_ADDR" in done.stderr
