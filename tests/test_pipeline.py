"""The whole pipeline as a user runs it, at scale=smoke: what is built, reused, resumed and refused."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mindpangu.config import load_recipe
from mindpangu.data.shards import read_shard


def _command(*overrides, module="train"):
    return [sys.executable, "-m", f"mindpangu.{module}", "scale=smoke", *overrides]


def _run(folder, *overrides, module="train", code=0):
    done = subprocess.run(_command(*overrides, module=module), cwd=folder, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def _kill_when(folder, condition, *overrides, module="train"):
    """Start a command and SIGKILL it as soon as condition() holds."""
    process = subprocess.Popen(_command(*overrides, module=module), cwd=folder, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    while not condition():
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.0005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def _only(folder, pattern):
    [found] = folder.glob(pattern)
    return found


def _history(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows if "loss" in row]


def _files(folder):
    # summary.json holds the time it took.
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in ("summary.json", ".lock")}


@pytest.fixture
def copy(smoke, tmp_path):
    """A folder with everything the smoke run built, to add to or to damage."""
    subprocess.run(["cp", "-a", smoke[0] / "runs", tmp_path], check=True)
    return tmp_path


def test_the_default_recipe_builds_all_it_needs_and_says_each_in_a_line(smoke):
    folder, output = smoke
    for line in (r"tokenizer: 768 pieces", r"sft_fast needs init_from=sft_reasoning: building it",
                 r"kd_student needs init_from=sft_fast: building it", r"kd_student needs teacher=sft_teacher: building",
                 r"rollout: the student answers 96 train prompts, 2 each", r"rollout: 192 answers",
                 r"annotate: the teacher scores the answers to 96 train prompts, top 10", r"annotate: \d+ supervised",
                 r"kd_student: done in"):
        assert re.search(line, output), line
    run = _only(folder, "runs/kd_student-smoke-*")
    assert {"recipe.yaml", "run.json", "env.json", "metrics.jsonl", "samples", "checkpoints", "report.html",
            "done.json"} <= {path.name for path in run.iterdir()}
    done = json.loads((run / "done.json").read_text())
    assert {"kl", "own_kl", "accuracy", "loss", "agreement"} <= set(done["before"]) & set(done["after"])
    assert done["after"]["kl"] < done["before"]["kl"]


def test_a_second_start_reuses_what_is_there_in_seconds(smoke):
    folder, _ = smoke
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "already complete" in _run(folder)
    assert "already complete" in _run(folder, "run.log_every=1", "run.save_every=7")  # run.* is not part of the key
    after = resource.getrusage(resource.RUSAGE_CHILDREN)  # of processor time: other programs may make it wait
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 6
    before = sorted(path.name for path in (folder / "runs").iterdir())
    assert load_recipe(["scale=smoke", "kd.weight=0.5"]).kd.weight == 0.5
    assert sorted(path.name for path in (folder / "runs").iterdir()) == before


def test_a_changed_loss_reuses_the_answers_and_their_annotations(copy):
    output = _run(copy, "kd.tail=renormalised_both", "kd.temperature=2", "kd.loss_form=additive")
    assert "building" not in output and output.count("rollout: the student") == 1  # held-out, after training
    assert len(list(copy.glob("runs/kd_student-smoke-*"))) == 2


# The other recipes run in README's commands and in the tests below.
@pytest.mark.parametrize("name", ["kd_teacher", "sft_reasoning_no_cot"])
def test_a_recipe_runs(copy, name):
    assert f"{name}: done" in _run(copy, f"recipe={name}")
    assert json.loads((_only(copy, f"runs/{name}-smoke-*") / "done.json").read_text())["step"] == 6


def test_answers_hold_what_the_sampler_drew_and_annotations_what_the_teacher_thinks(smoke, mindspore_cpu):
    """Stored ids and log-probabilities against full forward passes of the two models."""
    from mindspore import Tensor

    from mindpangu.distillation.annotate import read_annotated
    from mindpangu.distillation.sample import Answers
    from mindpangu.model.weights import load_model

    folder, _ = smoke

    def logprobs_of(run, tokens):
        model = load_model(_only(folder, f"runs/{run}-smoke-*/checkpoints/step-000006"))
        hidden = model(Tensor(tokens), Tensor(np.arange(len(tokens), dtype=np.int32)),
                       Tensor(np.array([0, len(tokens)])), len(tokens))
        logits = model.logits(hidden).asnumpy().astype(np.float64)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    folders = [path for path in folder.glob("runs/answers-smoke-*") if len(list(path.glob("*.shard"))) == 3]
    answers = Answers(**read_shard(folders[0] / "00001.shard"))
    assert list(answers.prompt_index[:4]) == [32, 32, 33, 33] and list(answers.sample_index[:4]) == [0, 1, 0, 1]
    n = 5
    tokens = answers.tokens[answers.offsets[n]:answers.offsets[n + 1]]
    length = answers.prompt_lens[n]
    student = logprobs_of("sft_fast", tokens)
    drawn = student[np.arange(length - 1, len(tokens) - 1), tokens[length:]]
    start = int((np.diff(answers.offsets) - answers.prompt_lens)[:n].sum())
    # Cached decoding and the full forward sum in another order: float32.
    np.testing.assert_allclose(answers.logprobs[start:start + len(drawn)], drawn, atol=2e-5)

    class Stored:
        def read_all(self):
            yield read_shard(annotated / "00001.shard")

    annotated = next(path for path in folder.glob("runs/annotations-smoke-*") if len(list(path.glob("*.shard"))) == 3)
    samples = read_annotated(Stored())
    np.testing.assert_array_equal(samples.tokens, answers.tokens)
    np.testing.assert_array_equal(samples.offsets, answers.offsets)
    teacher = logprobs_of("sft_teacher", tokens)[length - 1:-1]
    ids = samples.extras["teacher_ids"][start:start + len(teacher)]
    np.testing.assert_array_equal(samples.is_target[answers.offsets[n]:answers.offsets[n + 1]],
                                  np.arange(len(tokens)) >= length)
    top = np.sort(teacher, -1)[:, -10:][:, ::-1]
    # A teacher of 6 steps is nearly flat: its 10th and 11th token can tie to float32.
    np.testing.assert_allclose(np.take_along_axis(teacher, ids, 1), top, atol=1e-4)
    stored = samples.extras["teacher_logprobs"][start:start + len(teacher)]
    tail, stored_tail = 1 - np.exp(top).sum(-1), 1 - np.exp(stored.astype(np.float64)).sum(-1)
    kl = (np.exp(top) * (top - stored)).sum(-1) + tail * np.log(tail / stored_tail)
    assert 0 <= kl.mean() < 1e-4


def test_a_killed_training_run_repeats_the_uninterrupted_one_to_the_bit(copy):
    overrides = ["recipe=sft_fast", "train.steps=30", "run.log_every=1", "run.save_every=1"]
    whole, parts = copy / "whole", copy / "parts"
    _run(copy, *overrides, "run.dir=whole")
    checkpoints = parts / "checkpoints"
    _kill_when(copy, lambda: len(list(checkpoints.glob("step-*"))) >= 2, *overrides, "run.dir=parts")
    killed_at = max(int(path.name[5:]) for path in checkpoints.glob("step-*"))
    # Once more, now while a checkpoint is being written.
    _kill_when(copy, lambda: list(checkpoints.glob(f".writing-step-{killed_at + 4:06d}")), *overrides, "run.dir=parts")
    assert max(int(path.name[5:]) for path in checkpoints.glob("step-*")) >= killed_at + 2
    assert f"resuming at step {killed_at + 3}" in (output := _run(copy, *overrides, "run.dir=parts")) or re.search(
        r"resuming at step \d+", output)
    assert _history(parts) == _history(whole)
    for name in ("model.safetensors", "optimizer-00001-of-00001.safetensors"):
        final = Path("checkpoints/step-000030") / name
        assert (parts / final).read_bytes() == (whole / final).read_bytes()


@pytest.mark.long
def test_a_refreshed_run_that_was_killed_resumes_to_the_same_losses(copy):
    overrides = ["recipe=kd_student_refresh", "run.log_every=1", "run.save_every=1"]
    output = _run(copy, *overrides, "run.dir=whole")
    assert re.findall(r"refresh (\d) of 2 at step (\d)", output) == [("1", "2"), ("2", "4")]
    refreshed = copy / "parts" / "refresh-1" / "annotations"
    _kill_when(copy, lambda: (refreshed / "00000.shard").exists(), *overrides, "run.dir=parts")
    _run(copy, *overrides, "run.dir=parts")
    assert _history(copy / "parts") == _history(copy / "whole")


def test_killed_rollouts_and_annotations_end_in_the_same_bytes(smoke, tmp_path):
    folder, _ = smoke
    runs = tmp_path / "runs"
    runs.mkdir()
    for path in (folder / "runs").iterdir():
        if path.name.startswith(("sft_", "tokenizer")):
            (runs / path.name).symlink_to(path)
    wanted = {path.name: _files(path) for path in (folder / "runs").glob("a*-smoke-*")
              if len(list(path.glob("*.shard"))) == 3}
    answers, annotations = (next(runs / name for name in wanted if name.startswith(kind))
                            for kind in ("answers", "annotations"))
    _kill_when(tmp_path, lambda: (answers / "00001.shard").exists(), module="annotate")
    assert not (answers / "00002.shard").exists()
    _kill_when(tmp_path, lambda: (annotations / "00000.shard").exists(), module="annotate")
    _run(tmp_path, module="annotate")
    for name, files in wanted.items():
        assert _files(runs / name) == files


def test_filtered_answers_are_counted_and_not_trained_on(copy):
    output = _run(copy, "rollout.drop=[truncated,repetitive,wrong,short]", "rollout.min_tokens=6", module="annotate",
                  code=1)
    # A student of 6 steps is always wrong.
    assert "leaves no answer" in output and "192 wrong dropped" in output
    output = _run(copy, "rollout.drop=[truncated]", module="annotate")
    [(kept, dropped)] = re.findall(r"annotate: (\d+) supervised tokens, (\d+) truncated dropped", output)
    assert int(kept) > 0 and int(dropped) > 0


def test_at_scale_1b_the_commands_of_missing_runs_are_printed(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}, '
                                      '{"role": "assistant", "content": "b"}]}\n')
    done = subprocess.run([sys.executable, "-m", "mindpangu.train", "scale=1b", "data.train=[a.jsonl]",
                           "data.tokenizer=a.jsonl", "teacher=x"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    lines = ["python -m mindpangu.curate recipe=pretrain_annealing_32k scale=1b",
             "python -m mindpangu.train recipe=pretrain_annealing_32k scale=1b",
             "python -m mindpangu.train recipe=sft_reasoning scale=1b",
             "python -m mindpangu.train recipe=sft_fast scale=1b"]
    places = [done.stderr.find(line) for line in lines]
    assert -1 not in places and places == sorted(places), done.stderr


def test_training_in_bfloat16_keeps_the_loss_within_a_hundredth_and_float32_weights(copy):
    _run(copy, "recipe=sft_fast", "run.precision=bfloat16", "run.dir=runs/bfloat16")
    float32 = _only(copy, "runs/sft_fast-smoke-*")
    pairs = list(zip(_history(copy / "runs/bfloat16"), _history(float32), strict=True))
    assert len(pairs) >= 3 and any(ours[1] != theirs[1] for ours, theirs in pairs)
    for (step, loss, _), (same_step, expected, _) in pairs:
        assert step == same_step and abs(loss - expected) <= 0.01 * expected, (step, loss, expected)
    for file in (copy / "runs/bfloat16/checkpoints").glob("*/**/config.json"):
        assert json.loads(file.read_text())["torch_dtype"] == "float32"
