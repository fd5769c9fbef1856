"""What a user can get wrong: one clear line that names the field or file and what to do, exit code 1, no traceback."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mindpangu import annotate as annotate_module
from mindpangu import train as train_module
from mindpangu.config import load_recipe
from mindpangu.data.arithmetic import make_problems, to_example
from mindpangu.data.chat import list_stretches
from mindpangu.data.tokenizer import train_tokenizer
from mindpangu.runtime.checkpoint import lock_folder

WEIGHTS = "model.safetensors"
MODULES = {"train": train_module, "annotate": annotate_module}


def _stretches(language):
    problems = make_problems(400, 0, "train", language)
    return [stretch for dress in ("reasoning", "fast") for problem in problems
            for stretch in list_stretches(to_example(problem, dress).messages)]


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory):
    return train_tokenizer(_stretches("both"), 768, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model").model_file


@pytest.fixture(scope="session")
def student_folder(tokenizer_file, tmp_path_factory):
    """A Hugging Face folder with a random tiny student."""
    return _save_model(tmp_path_factory.mktemp("student") / "hf", tokenizer_file, "recipe=sft_fast")


def _save_model(folder, tokenizer_file, *overrides, max_shard_gib=4.0):
    import mindspore as ms

    from mindpangu.model.pangu import Pangu
    from mindpangu.model.weights import save_weights

    ms.set_device("CPU")
    save_weights(Pangu(load_recipe(["scale=smoke", *overrides]).model), folder, max_shard_gib=max_shard_gib)
    if tokenizer_file:
        shutil.copyfile(tokenizer_file, folder / "tokenizer.model")
    return folder


@pytest.fixture
def student(student_folder, tmp_path):
    """A copy to damage, ./student."""
    return shutil.copytree(student_folder, tmp_path / "student")


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """run(*overrides): the command in tmp_path, in this process. Returns its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*overrides, module="train"):
        monkeypatch.setattr(sys, "argv", [f"mindpangu.{module}", "scale=smoke", *overrides])
        capfd.readouterr()
        code = 0
        try:
            MODULES[module].main()
        except SystemExit as error:
            code = error.code
        return code, *capfd.readouterr()

    return call


@pytest.fixture
def error_of(run):
    """error_of(*overrides): the one message of a command that has to fail."""

    def call(*overrides, module="train"):
        code, _, stderr = run(*overrides, module=module)
        messages = [line for line in stderr.splitlines() if line.startswith("error: ")]
        assert code == 1 and len(messages) == 1 and "Traceback" not in stderr, stderr
        return stderr[stderr.index("error: "):]

    return call


def assert_says(message, *words):
    for word in words:
        assert word in message, message


def _chats(path, answers, bad_lines=()):
    """JSONL chats with the given answers; bad_lines: {line number: its text}."""
    lines = [json.dumps({"messages": [{"role": "user", "content": f"Question {n}?"},
                                      {"role": "assistant", "content": answer}]}) for n, answer in enumerate(answers)]
    for number, text in sorted(dict(bad_lines).items()):
        lines.insert(number - 1, text)
    path.write_text("".join(line + "\n" for line in lines))


FAST = ("recipe=sft_fast", "init_from=student")
CHATS = (*FAST, "data=chats", "data.train=[chats.jsonl]", "data.num_heldout=2")


# ---- The recipe and its files: known before MindSpore is needed ------------------------------------------------------

@pytest.mark.parametrize(("overrides", "words"), [
    (["data.seq_len=2048"], ["data.seq_len=2048", "model.max_seq_len=1024", "shorten data.seq_len"]),
    (["kd.top_k=769"], ["kd.top_k=769", "model.vocab_size=768"]),
    (["kd.temperature=0"], ["kd.temperature=0.0", "expected above 0", "kd.top_k=1"]),
    (["recipe=sft_fast", "init_from=nowhere"], ["init_from=nowhere", "Hugging Face folder", "sft_reasoning"]),
    (["recipe=sft_fast", "data=chats", "data.train=[none.jsonl]"], ["none.jsonl", "No such file"]),
    (["recipe=sft_fast", "data.tokenizer=none.model"], ["none.model", "No such file"]),
    (["recipe=sft_fast", "data.num_examples=0"], ["data.num_examples=0", "at least 1"]),
])
def test_a_wrong_recipe_names_the_field_and_what_to_do(error_of, tmp_path, overrides, words):
    assert_says(error_of(*overrides), *words)
    assert not (tmp_path / "runs").exists()


def test_the_process_itself_ends_with_one_line(tmp_path):
    done = subprocess.run([sys.executable, "-m", "mindpangu.train", "scale=smoke", "kd.temperature=0"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(r"error: kd\.temperature=0\.0: expected above 0; .*\n", done.stderr)


def test_another_tokenizer_than_the_checkpoints_is_refused(error_of, student, tmp_path):
    train_tokenizer(_stretches("en"), 768, tmp_path / "other.model")
    assert_says(error_of(*FAST, "data.tokenizer=other.model"), "data.tokenizer=other.model", "init_from=student",
                "student/tokenizer.model", "leave data.tokenizer out")


def test_a_tokenizer_of_another_size_is_refused(error_of, student, tmp_path):
    train_tokenizer(_stretches("en"), 512, student / "tokenizer.model")
    assert_says(error_of(*FAST), "model.vocab_size=768", "student/tokenizer.model", "512 pieces", "have to agree")


def test_a_file_that_is_no_tokenizer_is_named(error_of, student):
    (student / "tokenizer.model").write_bytes(b"<!DOCTYPE html>")
    assert_says(error_of(*FAST), "student/tokenizer.model", "not a SentencePiece model", ".model file")


def test_a_teacher_with_another_vocabulary_is_refused(error_of, student, tokenizer_file, tmp_path):
    teacher = _save_model(tmp_path / "teacher", None, "recipe=sft_teacher", "model.vocab_size=700")
    assert_says(error_of("init_from=student", "teacher=teacher"), "teacher=teacher", "vocabulary of 700",
                "model.vocab_size=768")
    shutil.rmtree(teacher)
    _save_model(teacher, None, "recipe=sft_teacher")
    train_tokenizer(_stretches("en"), 768, teacher / "tokenizer.model")
    assert_says(error_of("init_from=student", "teacher=teacher"), "teacher=teacher", "another tokenizer",
                "teacher/tokenizer.model", "student/tokenizer.model")


def test_a_malformed_line_is_named_with_file_number_and_reason(error_of, student, tmp_path):
    for line, reason in [('{"messages": [{"role": "user", "content": "a"}', "not JSON"),
                         ('{"message": []}', "missing key 'messages'"),
                         ('{"messages": [{"role": "user", "content": "a"}]}', "the last message has role 'user'"),
                         ('{"messages": [{"role": "bot", "content": "a"}]}', "messages[0].role='bot' is unknown")]:
        _chats(tmp_path / "chats.jsonl", ["yes"] * 6, {4: line})
        assert_says(error_of(*CHATS), "error: chats.jsonl:4: ", reason, "expected")


def test_an_empty_data_set_is_named(error_of, student, tmp_path):
    (tmp_path / "chats.jsonl").write_text("\n \n")
    assert_says(error_of(*CHATS), "chats.jsonl", "the file is empty", "at least one record")
    _chats(tmp_path / "chats.jsonl", [], {1: "{}", 2: "[]"})
    assert_says(error_of(*CHATS, "data.on_error=skip"), "data.train has only 0 examples", "data.num_heldout",
                "2 malformed lines skipped, the first: chats.jsonl:1: missing key 'messages'")


def test_samples_that_are_all_too_long_are_an_error(error_of, student, tmp_path):
    _chats(tmp_path / "chats.jsonl", ["one two three " * 40] * 9)
    assert_says(error_of(*CHATS), "data.seq_len=128", "7 of 7 samples are longer", "raise data.seq_len")


# ---- Weights ---------------------------------------------------------------------------------------------------------

def test_missing_weights_are_named(error_of, student):
    (student / WEIGHTS).unlink()
    assert_says(error_of(*FAST), "student has neither model.safetensors", "expected safetensors weights")
    (student / "config.json").unlink()
    assert_says(error_of(*FAST), "init_from=student", "with config.json")


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_truncated_weights_are_named(error_of, student, share):
    content = (student / WEIGHTS).read_bytes()
    (student / WEIGHTS).write_bytes(content[:int(share * len(content))])
    assert_says(error_of(*FAST), "student/model.safetensors is truncated", "download or copy it again")


def test_an_interrupted_download_names_the_shard(error_of, tokenizer_file, tmp_path):
    student = _save_model(tmp_path / "student", tokenizer_file, "recipe=sft_fast", max_shard_gib=2e-4)
    shards = sorted(student.glob("model-*.safetensors"))
    assert len(shards) >= 3
    content = shards[1].read_bytes()
    shards[1].write_bytes(content[:-1000])
    assert_says(error_of(*FAST), shards[1].name, "is truncated", "download or copy it again")
    shards[1].unlink()
    assert_says(error_of(*FAST), "student lacks", shards[1].name, "model.safetensors.index.json", "again")
    (student / "model.safetensors.index.json").write_text('{"weight_map": {')
    assert_says(error_of(*FAST), "model.safetensors.index.json is not JSON", "download or copy it again")


def test_missing_unknown_and_wrongly_shaped_tensors_are_listed_together(error_of, student):
    tensors = load_file(student / WEIGHTS)
    del tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"][:5].copy()
    tensors["model.layers.9.extra"] = np.zeros(3, np.float32)
    save_file(tensors, student / WEIGHTS)
    assert_says(error_of(*FAST), "student does not hold the weights of this model", "model.norm.weight is missing",
                "up_proj.weight has shape [5, 64]: expected [192, 64]", "model.layers.9.extra", "is unknown")


def test_a_checkpoint_of_another_model_is_refused(error_of, tokenizer_file, tmp_path):
    _save_model(tmp_path / "student", tokenizer_file, "recipe=sft_teacher")
    message = error_of(*FAST)
    assert_says(message, "student does not hold the weights of this model", "model.num_layers=2", "config.json says 3",
                "choose the other model")


def test_weights_with_nan_stop_before_an_update(error_of, student, tmp_path):
    tensors = load_file(student / WEIGHTS)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 3] = np.nan
    save_file(tensors, student / WEIGHTS)
    _chats(tmp_path / "chats.jsonl", ["yes"] * 20)
    message = error_of(*CHATS, "run.dir=run")
    assert_says(message, "step 0, held-out loss nan", "not finite", "last good checkpoint is none", "Check the weights")
    assert not list(tmp_path.glob("run/checkpoints/step-*")) and not (tmp_path / "run/done.json").exists()


def test_a_teacher_with_nan_is_refused(error_of, student, tokenizer_file, tmp_path):
    teacher = _save_model(tmp_path / "teacher", tokenizer_file, "recipe=sft_teacher")
    tensors = load_file(teacher / WEIGHTS)
    tensors["model.norm.weight"][:] = np.nan
    save_file(tensors, teacher / WEIGHTS)
    message = error_of("recipe=kd_label", "init_from=student", "teacher=teacher", module="annotate")
    assert_says(message, "teacher's log-probabilities hold NaN", "check the teacher's weights")


def test_weights_without_their_tokenizer_are_refused(error_of, student, tmp_path):
    (student / "tokenizer.model").unlink()
    _chats(tmp_path / "chats.jsonl", _stretches("en")[:600])
    assert_says(error_of(*CHATS, "train.steps=1"), "init_from=student", "tokenizer.model", "data.tokenizer")


def test_rows_longer_than_the_checkpoint_was_made_for_are_refused(error_of, student, tmp_path):
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    _chats(tmp_path / "chats.jsonl", ["yes"] * 20)
    assert_says(error_of(*CHATS, "train.steps=1"), "data.seq_len=128", "init_from=student", "64")


# ---- Run folders and caches ------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def interrupted(student_folder, tmp_path_factory):
    """A folder in which a run in ./run was killed while a second one, whose exit is given, met it."""
    folder = tmp_path_factory.mktemp("interrupted")
    shutil.copytree(student_folder, folder / "student")
    command = [sys.executable, "-m", "mindpangu.train", "scale=smoke", *FAST, "run.dir=run", "train.steps=3000"]
    first = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (folder / "run" / "recipe.yaml").exists():
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        before = {path.name for path in (folder / "run").iterdir()}
        second = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert first.poll() is None and before <= {path.name for path in (folder / "run").iterdir()}
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    return folder, first.pid, second


@pytest.fixture
def killed(interrupted, tmp_path):
    """./run, unfinished, and the ./student that it started from."""
    for name in ("run", "student"):
        shutil.copytree(interrupted[0] / name, tmp_path / name, symlinks=True)
    return tmp_path / "run"


def test_a_second_run_in_one_folder_is_refused_while_the_first_runs(interrupted):
    _, first_pid, second = interrupted
    assert second.returncode == 1 and "Traceback" not in second.stderr
    assert_says(second.stderr, "error: run is in use by another run", f"process {first_pid}",
                "choose another run.dir")


def test_a_folder_that_holds_another_run_is_refused_with_the_fields_that_differ(error_of, killed):
    before = {path.name: path.stat().st_mtime_ns for path in killed.iterdir()}
    message = error_of(*FAST, "run.dir=run", "train.steps=1", "train.lr=1e-3", "data.seed=7")
    assert_says(message, "run folder run holds another run", "train.steps: 3000 | 1", "train.lr: 0.004 | 0.001",
                "data.seed: 0 | 7", "Choose another run.dir")
    assert "warmup" not in message
    (killed / "run.json").write_text((killed / "run.json").read_text().replace('"key": "', '"key": "0'))
    message = error_of(*FAST, "run.dir=run", "train.steps=3000")
    assert_says(message, "run folder run holds another run", "its inputs (data files, init_from or teacher) changed")
    assert {name for name in before} == {path.name for path in killed.iterdir()}


def test_a_damaged_description_of_a_run_is_named(error_of, killed):
    for content in ('{"key": "', "[]", '{"key": "1"}'):
        (killed / "run.json").write_text(content)
        assert_says(error_of(*FAST, "run.dir=run"), "run/run.json does not describe a run", "restore it, or delete run")


def test_an_unfinished_run_is_no_start(error_of, killed):
    assert_says(error_of("recipe=sft_fast", "init_from=run"), "init_from=run", "not complete",
                "run its command again")


@pytest.fixture
def distilled(smoke, tmp_path):
    """./runs with all that the smoke run built but its student; the folders of its answers and annotations."""
    runs = tmp_path / "runs"
    shutil.copytree(smoke[0] / "runs", runs, symlinks=True)
    [student] = runs.glob("kd_student-smoke-*")
    shutil.rmtree(student)
    return [next(folder for folder in runs.glob(f"{kind}-smoke-*") if (folder / "00002.shard").exists())
            for kind in ("answers", "annotations")]


def test_a_damaged_annotation_is_named_and_made_again_once_deleted(error_of, run, distilled):
    _, annotations = distilled
    shard = annotations / "00001.shard"
    good = shard.read_bytes()
    flipped = good[:900] + bytes([good[900] ^ 1]) + good[901:]
    for content, reason in [(good[:-7], f"{len(good) - 7} bytes, expected {len(good)}"),
                            (flipped, "truncated or corrupted"), (b"", f"0 bytes, expected {len(good)}")]:
        shard.write_bytes(content)
        assert_says(error_of(), f"{annotations.name}/00001.shard", reason, "delete it and run the command")
    shard.unlink()
    code, _, _ = run(module="annotate")
    assert code == 0 and shard.read_bytes() == good


def test_a_damaged_answer_is_named(error_of, distilled):
    answers, annotations = distilled
    (annotations / "00002.shard").unlink()
    content = (answers / "00002.shard").read_bytes()
    (answers / "00002.shard").write_bytes(content[:len(content) // 2])
    assert_says(error_of(module="annotate"), f"{answers.name}/00002.shard", "expected", "delete it and run the command")


def test_a_refused_run_leaves_the_files_that_another_is_writing(error_of, distilled):
    answers = distilled[0]
    for folder in distilled:
        (folder / "00002.shard").unlink()
    (answers / "00002.shard.partial").write_bytes(b"half of a shard")
    with lock_folder(answers):
        assert_says(error_of(module="annotate"), f"{answers.name} is in use by another run")
        assert (answers / "00002.shard.partial").exists()


@pytest.mark.parametrize("key", ["teacher", "tokenizer", "template", "answers"])
def test_annotations_bound_to_something_else_are_refused_with_what_differs(error_of, distilled, key):
    path = distilled[1] / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["binding"][key] = "other"
    path.write_text(json.dumps(manifest))
    message = error_of()
    assert_says(message, distilled[1].name, "made from something else", f"{key} differs: manifest other, this run ")
    assert message.count("differs") == 1


def test_malformed_lines_are_skipped_on_request_and_like_long_samples_counted(run, student, tmp_path):
    answers = [*(f"Answer {n}." for n in range(10)), "long " * 100, "longer " * 100, "longest " * 100]
    _chats(tmp_path / "chats.jsonl", answers, {3: "{}", 7: "nonsense"})
    code, output, stderr = run(*CHATS, "data.on_error=skip", "train.steps=1", "run.dir=run")
    assert code == 0, stderr
    assert_says(output, "data.on_error=skip: 2 malformed lines skipped, the first: chats.jsonl:3: missing key")
    [(kept, dropped)] = re.findall(r"data: (\d+) samples in .*, (\d+) over-long samples dropped", output)
    assert int(kept) + int(dropped) == 11 and 1 <= int(dropped) <= 3  # two of 13 are held out
    assert json.loads((tmp_path / "run/done.json").read_text())["step"] == 1
