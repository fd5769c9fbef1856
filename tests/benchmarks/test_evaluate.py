"""python -m mindpangu.evaluate: a whole evaluation, one that is killed, lm-eval's own command line, wrong requests."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from mindpangu.benchmarks import files
from mindpangu.config import load_recipe
from mindpangu.evaluate import evaluate, long_form
from mindpangu.rewards.sandbox import Isolation

LIMIT = 16
OVERRIDES = ["recipe=eval_instruct", "eval.tasks=[gsm8k,cluewsc]", f"eval.limit={LIMIT}", "eval.max_new_tokens=64",
             "eval.num_slots=2", "data.tokenizer=null"]
NUM_REQUESTS = LIMIT + 4


@pytest.fixture(scope="module")
def folder(benchmarks_dir, write_jsonl, tmp_path_factory):
    """Where GSM8K is not at hand, problems of our own in its form."""
    if (benchmarks_dir / "gsm8k").is_dir():
        return benchmarks_dir
    problems = [{"question": f"Tom has {i} apples and buys 3 more. How many?", "answer": f"#### {i + 3}"}
                for i in range(LIMIT)]
    for split in ("train", "test"):
        write_jsonl(benchmarks_dir / f"gsm8k/{split}.jsonl", problems)
    return benchmarks_dir


def command(folder, model, *more):
    return [sys.executable, "-m", "mindpangu.evaluate", *OVERRIDES, f"model={model}", f"benchmarks.dir={folder}", *more]


@pytest.fixture(scope="module")
def finished(folder, tiny_models, tmp_path_factory):
    """(folder in which an evaluation ran, its run folder, what it printed)."""
    home = tmp_path_factory.mktemp("finished")
    done = subprocess.run(command(folder, tiny_models["trained"]), cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [run] = (home / "runs").glob("eval_instruct-*")
    return home, run, done.stdout


def test_an_evaluation_leaves_results_samples_and_a_table(finished, folder, tiny_models):
    _, run, printed = finished
    results = json.loads((run / "results.json").read_text())
    gsm8k, cluewsc = results["benchmarks"]["gsm8k"], results["benchmarks"]["cluewsc"]
    assert (gsm8k["N"], cluewsc["N"]) == (LIMIT, 4) and sum(gsm8k["reasons"].values()) == LIMIT
    assert gsm8k["k"] == gsm8k["reasons"].get("correct", 0) and gsm8k["score"] == 100 * gsm8k["k"] / LIMIT
    assert results["model"]["folder"] == str(tiny_models["trained"])
    assert results["measured"]["generate_until"]["requests"] == NUM_REQUESTS
    samples = [json.loads(line) for line in (run / "samples" / "gsm8k.jsonl").read_text().splitlines()]
    assert len(samples) == LIMIT and sum(sample["value"] for sample in samples) == gsm8k["k"]
    first = files.SOURCES["gsm8k"].read(folder)["test"][0]["question"]
    assert first in samples[0]["prompt"] and samples[0]["prompt"].startswith("<s>[unused9]系统：[unused10]")
    for words in ("GSM8K", "82.76", "CLUEWSC", "tokens/s", "average of 2"):
        assert words in printed
    assert json.loads((run / "done.json").read_text())["after"]["gsm8k"] == gsm8k["score"] / 100


def test_a_second_start_finds_it_complete(finished, folder, tiny_models, monkeypatch, capsys):
    home, run, _ = finished
    monkeypatch.chdir(home)
    overrides = [long_form(override) for override in command(folder, tiny_models["trained"])[3:]]
    before = (run / "results.json").stat().st_mtime_ns
    assert evaluate(load_recipe(overrides), overrides) == run.relative_to(home)
    assert "already complete" in capsys.readouterr().out and (run / "results.json").stat().st_mtime_ns == before
    for other, words in (("eval.limit=15", r"eval\.limit: 16 \| 15"),
                         ("run.precision=bfloat16", r"run\.precision: 'float32' \| 'bfloat16'"),
                         ("rewards.code.timeout_s=1", r"rewards\.code\.timeout_s: 10\.0 \| 1\.0")):
        changed = [*overrides, other, f"run.dir={run}"]
        with pytest.raises(ValueError, match=words):
            evaluate(load_recipe(changed), changed)


def test_a_killed_evaluation_answers_only_what_is_missing(finished, folder, tiny_models, tmp_path):
    responses = tmp_path / "runs" / "responses"
    with open(tmp_path / "log", "w") as log:
        killed = subprocess.Popen(command(folder, tiny_models["trained"]), cwd=tmp_path, stdout=log, stderr=log)
    deadline = time.monotonic() + 120
    while not any(path.stat().st_size for path in responses.glob("*.jsonl")):
        assert killed.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    [path] = responses.glob("*.jsonl")
    answered = path.read_bytes().count(b"\n")
    assert 0 < answered < NUM_REQUESTS and not list((tmp_path / "runs").glob("eval_instruct-*/results.json"))
    with open(path, "ab") as file:  # a kill in the middle of a line
        file.write(b'{"key": "12')
    done = subprocess.run(command(folder, tiny_models["trained"]), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{NUM_REQUESTS} requests, {answered} of them answered before" in done.stdout
    [run] = (tmp_path / "runs").glob("eval_instruct-*")
    for name in ("gsm8k", "cluewsc"):
        assert (run / f"samples/{name}.jsonl").read_text() == (finished[1] / f"samples/{name}.jsonl").read_text()


@pytest.mark.long  # a minute: lm-eval first reads the thousands of its tasks
def test_lm_eval_s_own_command_line_takes_our_models_and_tasks(folder, tiny_models, tmp_path):
    tasks = os.path.join(os.path.dirname(files.__file__), "tasks")
    for name, model in tiny_models.items():
        done = subprocess.run(
            [sys.executable, "-m", "mindpangu.evaluate", "lm_eval", "--model", "mindpangu", "--model_args",
             f"pretrained={model},responses=responses", "--tasks", "pangu_base_cluewsc", "--include_path", tasks,
             "--limit", "2", "--metadata", f"benchmarks_dir={folder}", "--output_path", tmp_path / name],
            cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        assert done.returncode == 0, done.stdout + done.stderr
        assert "pangu_base_cluewsc" in done.stdout and "mindpangu" in done.stdout
        [found] = (tmp_path / name).rglob("results_*.json")
        assert json.loads(found.read_text())["n-samples"]["pangu_base_cluewsc"]["effective"] == 2
    assert len(list((tmp_path / "responses").iterdir())) == 2, "no model is given another one's responses"


@pytest.mark.parametrize(("argument", "expected"), [
    ("tasks=a,b", "eval.tasks=[a,b]"), ("tasks=[a]", "eval.tasks=[a]"), ("model=/x/y", "init_from='/x/y'"),
    ("model='x'", "init_from='x'"), ("model=openpangu_1b", "model=openpangu_1b"),
    ("benchmarks.dir=/data", "eval.benchmarks_dir='/data'"), ("seed=1", "seed=1"), ("--multirun", "--multirun")])
def test_short_forms_stand_for_the_recipe_s_fields(argument, expected):
    assert long_form(argument) == expected


@pytest.mark.parametrize("path", ["/x/y", "runs/kd=1", "~/a b", "it's (1), {2}", "a,b", "[x]"])
def test_any_path_can_be_the_model_s_and_the_benchmarks(path):
    recipe = load_recipe(["recipe=eval_instruct", long_form(f"model={path}"), long_form(f"benchmarks.dir={path}")])
    assert recipe.init_from == recipe.eval.benchmarks_dir == path


@pytest.mark.parametrize(("overrides", "words"), [
    (["recipe=eval_instruct", "eval.tasks=[gsm9k]"], "gsm9k unknown with eval.form=instruct"),
    (["recipe=eval_base", "eval.tasks=[gsm8k]"], r"gsm8k/train.jsonl(.|\n)*grade-school-math(.|\n)*licence: MIT"),
    (["recipe=eval_instruct", "init_from=null"], "init_from=None: expected the model to measure"),
    (["recipe=sft_fast"], "recipe=sft_fast is no evaluation")])
def test_wrong_requests_say_what_to_do(overrides, words, tmp_path):
    overrides = [*overrides, f"eval.benchmarks_dir={tmp_path}"]
    with pytest.raises(ValueError, match=words):
        evaluate(load_recipe(overrides), overrides)


def test_code_that_nothing_could_run_is_refused_before_any_answer(tiny_models, write_jsonl, tmp_path, monkeypatch):
    write_jsonl(tmp_path / "humaneval/HumanEval.jsonl", [])
    (tmp_path / "humaneval/HumanEval.jsonl").rename(tmp_path / "humaneval/HumanEval.jsonl.gz")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mindpangu.rewards.sandbox.describe_isolation", Isolation)
    overrides = ["recipe=eval_instruct", "eval.tasks=[humaneval]", "data.tokenizer=null", "eval.benchmarks_dir=.",
                 long_form(f"model={tiny_models['trained']}")]
    with pytest.raises(ValueError, match="cannot isolate .*rewards.code.allow_unsafe=true"):
        evaluate(load_recipe(overrides), overrides)
    assert not (tmp_path / "runs/responses").exists()


def test_help_is_about_evaluation():
    done = subprocess.run([sys.executable, "-m", "mindpangu.evaluate", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "recipe=eval_instruct model=RUN" in done.stdout and "--list-tasks" in done.stdout


def test_the_list_of_tasks_needs_nothing(tmp_path):
    done = subprocess.run([sys.executable, "-m", "mindpangu.evaluate", "--list-tasks", f"benchmarks.dir={tmp_path}"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and f"read from {tmp_path}" in done.stdout and "MISSING" in done.stdout
    assert not list(tmp_path.iterdir())
