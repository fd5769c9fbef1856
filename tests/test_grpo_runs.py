"""GRPO as a user runs it, at scale=smoke: what is on disk, how it resumes, and rollouts by a server."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from mindpangu.data import attributes
from mindpangu.data.sources import Document

ROLLOUTS = ["recipe=grpo", "rollout.prompts_per_shard=2", "run.save_every=1", "run.keep_checkpoints=10"]


def command(*overrides):
    return [sys.executable, "-m", "mindpangu.train", "scale=smoke", *overrides]


def run(folder, *overrides, code=0):
    done = subprocess.run(command(*overrides), cwd=folder, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def kill_when(folder, condition, *overrides):
    process = subprocess.Popen(command(*overrides), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not condition():
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.0005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def history(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"], row["reward"], row["kl"]) for row in rows if "loss" in row]


def completions(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.glob("rollouts/*/round-*.jsonl")}


@pytest.fixture(scope="module")
def base(smoke, tmp_path_factory):
    """A folder with the run that GRPO starts from, and an uninterrupted GRPO run in ./whole."""
    folder = tmp_path_factory.mktemp("grpo")
    subprocess.run(["cp", "-a", smoke[0] / "runs", folder], check=True)
    return folder, run(folder, *ROLLOUTS, "run.dir=whole")


@pytest.fixture
def copy(base, tmp_path):
    subprocess.run(["cp", "-a", base[0] / "runs", base[0] / "whole", tmp_path], check=True)
    return tmp_path


def test_every_completion_is_on_disk_with_its_rewards_and_the_report_shows_some(base):
    folder, output = base
    assert re.search(r"rewards: 96 math problems", output)
    rollouts = completions(folder / "whole")
    assert sorted(rollouts) == [f"rollouts/00000{i}/round-0.jsonl" for i in range(3)]
    for text in rollouts.values():
        rows = [json.loads(line) for line in text.splitlines()]
        assert len(rows) == 8 * 4
        for row in rows:
            assert row["reward"] in (-1.0, -0.5, 1.0) and row["parts"].keys() == {"correct", "format"}
            assert row["reward"] == -1 if row["truncated"] else row["reward"] > -1 or row["reason"] != "correct"
        for prompt in {row["prompt_index"] for row in rows}:
            group = [row for row in rows if row["prompt_index"] == prompt]
            mean = sum(row["reward"] for row in group) / 4
            assert [row["live"] for row in group] == [row["reward"] != mean for row in group]
    rows = [json.loads(line) for line in (folder / "whole" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    for row in steps:
        assert {"reward", "correct", "answer_len", "dead_groups", "truncated", "entropy", "kl", "clipped",
                "rollout_time", "sampler_diff", "sampler_diff_max"} <= row.keys()
        assert row["sampler_diff_max"] <= 1e-4
        assert sum(value for name, value in row.items() if name.startswith("reason/")) == 32
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-6), "the first update starts at the reference"
    report = (folder / "whole" / "report.html").read_text()
    assert "rollout 3: rewards" in report and "Groups that teach nothing" in report


def test_a_run_killed_in_a_rollout_and_in_an_update_repeats_the_uninterrupted_one_to_the_bit(copy):
    parts, overrides = copy / "parts", [*ROLLOUTS, "run.dir=parts"]
    # In the middle of the second rollout: one of its four shards is there.
    manifest = parts / "rollouts/000001/round-0/manifest.json"
    kill_when(copy, lambda: manifest.exists() and json.loads(manifest.read_text())["shards"], *overrides)
    assert not (parts / "rollouts/000001/round-0.jsonl").exists()
    first_shard = (parts / "rollouts/000001/round-0/00000.shard").stat().st_mtime_ns
    # Between the two updates of that rollout.
    kill_when(copy, lambda: (parts / "checkpoints/step-000003").exists(), *overrides)
    assert (parts / "rollouts/000001/round-0/00000.shard").stat().st_mtime_ns == first_shard, "kept, not sampled again"
    if not (parts / "checkpoints/step-000004").exists():
        state = json.loads((parts / "checkpoints/step-000003/state.json").read_text())
        assert state["state"]["batches"]["place"]["update"] == 1
    run(copy, *overrides)
    assert history(parts) == history(copy / "whole")
    assert completions(parts) == completions(copy / "whole")


@pytest.mark.long
def test_a_run_that_was_killed_long_after_its_checkpoint_goes_on_as_the_uninterrupted_one(copy):
    parts, overrides = copy / "parts", [*ROLLOUTS, "run.dir=parts"]
    run(copy, *overrides)
    for step in (3, 4, 5, 6):
        shutil.rmtree(parts / f"checkpoints/step-00000{step}")
    (parts / "checkpoints/best").unlink(missing_ok=True)
    (parts / "done.json").unlink()
    run(copy, *overrides)
    assert history(parts) == history(copy / "whole")


def test_answers_that_training_went_on_from_are_missed(copy):
    for step in (4, 5, 6):
        shutil.rmtree(copy / f"whole/checkpoints/step-00000{step}")
    (copy / "whole/checkpoints/best").unlink(missing_ok=True)
    (copy / "whole/done.json").unlink()
    shutil.rmtree(copy / "whole/rollouts/000001")
    output = run(copy, *ROLLOUTS, "run.dir=whole", code=1)
    assert "000001 is gone or incomplete, but training went on from its answers" in output
    assert "Traceback" not in output


def test_dynamic_sampling_takes_prompts_until_enough_groups_differ(copy):
    output = run(copy, *ROLLOUTS, "run.dir=dynamic", "grpo.dynamic_sampling=true", "grpo.max_resamples=2",
                 "train.steps=2")
    assert "grpo: done" in output
    rows = [json.loads(line) for line in (copy / "dynamic/metrics.jsonl").read_text().splitlines()]
    [first, *_] = [row for row in rows if "loss" in row]
    num_rounds = len(list((copy / "dynamic/rollouts/000000").glob("round-*.jsonl")))
    assert first["rounds"] == num_rounds
    groups, live = {}, 0
    for number in range(num_rounds):
        assert live < 8, "a round more than needed"
        for line in (copy / f"dynamic/rollouts/000000/round-{number}.jsonl").read_text().splitlines():
            row = json.loads(line)
            groups.setdefault((number, row["prompt_index"]), []).append(row["live"])
        live = sum(map(any, groups.values()))
    assert live >= 8 or num_rounds == 3


@pytest.mark.parametrize("options", [["grpo.importance_cap=2"],
                                     ["grpo.mask_truncated=true", "grpo.loss_agg=fixed_length",
                                      "grpo.kl_coefficient=0"]])
def test_options_run_and_change_the_loss(copy, options):
    run(copy, *ROLLOUTS, "run.dir=other", *options, "train.steps=2")
    ours, whole = history(copy / "other"), history(copy / "whole")[:2]
    assert [row[3] for row in ours] == [row[3] for row in whole], "the same answers, the same rewards"
    if "grpo.importance_cap=2" in options:  # sampler and trainer agree: the correction is 1
        assert ours[0][1] == pytest.approx(whole[0][1], rel=1e-4)
    else:
        assert ours[1][1:3] != whole[1][1:3]


@pytest.mark.long
def test_rollouts_by_a_server_use_the_weights_of_the_moment(copy, serving):
    """The trainer's log-probabilities, of its weights, are those that the server sampled by, in every rollout and
    within the kept set of top-k and top-p: so its weights are the trainer's."""
    start = next(copy.glob("runs/kd_student-smoke-*"))
    with serving(str(start), "--max-prompt-len", "80", "--max-new-tokens", "48") as url:
        run(copy, *ROLLOUTS, "run.dir=served", "rollout.engine=openai", f"rollout.server.url={url}",
            "rollout.top_p=0.9", "rollout.top_k=50", "rollout.temperature=0.8", "rollout.server.prompts_per_request=3",
            "train.lr=1e-2")
        steps = [json.loads(line) for line in (copy / "served/metrics.jsonl").read_text().splitlines()]
        steps = [row for row in steps if "loss" in row]
        assert len(steps) == 6 and all(row["sampler_diff_max"] <= 1e-4 for row in steps)
        assert steps[-1]["kl"] > 1e-3, "the weights have moved far"
        rows = [json.loads(line) for line in completions(copy / "served")["rollouts/000002/round-0.jsonl"].splitlines()]
        groups = {}
        for row in rows:
            groups.setdefault(row["prompt_index"], []).append(row["answer"])
        assert len(groups) == 8 and all(len(set(answers)) == 4 for answers in groups.values())
    output = run(copy, *ROLLOUTS, "run.dir=gone", "rollout.engine=openai", f"rollout.server.url={url}", code=1)
    assert f"{url.removesuffix('/v1')}/reload does not take the weights" in output and "Traceback" not in output


def test_problems_of_several_kinds_train_together(copy):
    """Code by tests and maths by value, from a file; the isolation of this machine is said at the start."""
    problems = [{"prompt": f"What is {i} + {i}?", "answer": 2 * i} for i in range(10, 22)]
    problems += [{"prompt": f"Write f that adds {i}.", "tests": [f"assert f(1) == {1 + i}"]} for i in range(12)]
    (copy / "problems.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    start = next(copy.glob("runs/kd_student-smoke-*"))
    output = run(copy, "recipe=grpo", "data=problems", "data.train=[problems.jsonl]", "data.num_heldout=6",
                 f"init_from={start}", "run.dir=mixed", "train.steps=2", "data.num_examples=0")
    assert re.search(r"rewards: \d+ code problems, \d+ math problems; code runs .*rlimits", output)
    rows = [json.loads(line) for line in completions(copy / "mixed")["rollouts/000000/round-0.jsonl"].splitlines()]
    assert {row["reason"] for row in rows} & {"no_code", "truncated"}
    broken = copy / "broken.jsonl"
    broken.write_text("".join(json.dumps(problem) + "\n" for problem in [*problems, {"prompt": "Tell a story."}] * 2))
    output = run(copy, "recipe=grpo", "data=problems", "data.train=[broken.jsonl]", "data.num_heldout=6",
                 f"init_from={start}", "run.dir=broken", "data.num_examples=0", code=1)
    assert "rewards.judge.url is missing" in output and "Traceback" not in output


def test_problems_that_are_never_solved_are_left_out_and_stories_are_judged_in_training(copy, running_judge):
    """A model of six steps solves nothing, so that the filter leaves the stories alone."""
    problems = [{"prompt": f"What is {i} + {i}?", "answer": 2 * i} for i in range(10, 22)]
    problems += [{"prompt": f"Tell story {i}.", "task_type": "preference"} for i in range(12)]
    (copy / "problems.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    start = next(copy.glob("runs/kd_student-smoke-*"))
    with running_judge() as judge:
        output = run(copy, "recipe=grpo", "data=problems", "data.train=[problems.jsonl]", "data.num_heldout=6",
                     f"init_from={start}", "run.dir=stories", "train.steps=2", "data.num_examples=0",
                     "grpo.pass_rate_samples=2", f"rewards.judge.url={judge.url}")
    never = int(re.search(r"pass rate of 2: never (\d+), always 0, sometimes 0; (\d+) of 18 problems kept", output)[1])
    rows = [json.loads(line) for text in completions(copy / "stories").values() for line in text.splitlines()]
    assert {row["prompt"].partition(" ")[0] for row in rows} == {"Tell"} and never > 3
    assert "judged" in {row["reason"] for row in rows} and all("correct" not in row["parts"] for row in rows)
    assert "Pass rates before training" in (copy / "stories/report.html").read_text()


def test_rollout_measures_the_pass_rate_of_every_problem_and_documents_find_theirs_by_prompt(memorised_run, tmp_path):
    """The oracle: a model that knows the first 20 of the 40 problems by heart, and was never told of the others."""
    command = [sys.executable, "-m", "mindpangu.rollout", "scale=smoke", "recipe=grpo", f"init_from={memorised_run}",
               "data.dress=reasoning", "data.num_examples=40", "data.num_heldout=1", "grpo.pass_rate_samples=2",
               "rollout.temperature=0.01", "data.seq_len=192", "rollout.max_new_tokens=112", "run.dir=rates"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "rates" / "pass_rates.jsonl").read_text().splitlines()]
    assert len(rows) == 40 and {row["samples"] for row in rows} == {2}
    assert sum(row["passed"] for row in rows[:20]) > 30 > 20 > sum(row["passed"] for row in rows[20:])

    rates = attributes.pass_rates(tmp_path / "rates")
    documents = [Document("", {"prompt": f" {row['prompt'].upper()}\n"}, "s", "en", None, None, "f", 1) for row in rows]
    documents.append(documents[0]._replace(record={"prompt": "Who?"}))
    found = attributes.add_complexity(documents, attributes.annotate_by_rules(documents), rates)
    assert [a.complexity for a in found] == [*(1 - row["passed"] / 2 for row in rows), None]
    assert not list((tmp_path / "rates").glob("checkpoints"))
