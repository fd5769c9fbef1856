"""The whole command: what stays, what is dropped and why; again after a kill, on a full disk, on bad input."""

import gzip
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from mindpangu.benchmarks.items import list_items
from mindpangu.config import load_recipe
from mindpangu.curate import curate
from mindpangu.data.decontaminate import CONTAINED_WORDS
from mindpangu.data.documents import read_chats
from mindpangu.data.packed_shards import PackedShards
from mindpangu.data.pool import json_line
from mindpangu.data.tokenizer import Tokenizer, train_tokenizer
from mindpangu.data.words import hash_words
from mindpangu.pipeline import Plan

WORDS = [f"w{n}" for n in range(300)] + list("水火山川日月大小中文") + ["😀", "naïve"]
BENCHMARK = "Which of these seven rivers is the longest one in the whole of northern Europe today?"


def _records():
    """(records, {place: reason}) of two sources with one flaw each."""
    rng, records, flaws = random.Random(0), [], {}
    for n in range(240):
        question = " ".join(rng.choices(WORDS, k=rng.randint(15, 40)))
        records.append({"question": question, "answer": " ".join(rng.choices(WORDS, k=20))})
        if n % 20 == 0:
            flaws[len(records)] = "exact_duplicate"
            records.append({"question": question.upper(), "answer": "  " + records[-1]["answer"]})
        if n % 20 == 5:
            flaws[len(records)] = "near_duplicate"  # of the one before, or that of it: which is better is not said here
            records.append({"question": question, "answer": records[-1]["answer"].replace(" ", " , ", 2) + " extra"})
        if n % 40 == 9:
            flaws[len(records)] = "benchmark_item"
            records.append({"question": f"{question} {BENCHMARK.upper()}", "answer": "The Volga"})
    flaws[len(records)] = "too_many_tokens"
    records.append({"question": " ".join(rng.choices(WORDS, k=230_000)), "answer": "1 MB"})
    flaws[len(records)] = "no_reply"
    records.append({"text": "😀 plain text has no reply"})
    flaws[len(records)] = "formatting"
    records.append({"question": "a\0b", "answer": "NUL"})
    flaws[len(records)] = "repetitive"
    records.append({"question": "Again?", "answer": "again and again and over and over once more. " * 30})
    return records, flaws


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    records, flaws = _records()
    half = len(records) // 2
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(b"".join(map(json_line, records[:half])) + b'{"question": 1\n'))
    (folder / "b.jsonl").write_bytes(b"".join(map(json_line, records[half:])))
    (folder / "items.jsonl").write_bytes(json_line({"question": BENCHMARK, "answer": "A"}))
    train_tokenizer([" ".join(WORDS) for _ in range(5)], 310, folder / "tokenizer.model")
    return folder, records, flaws


def listed(folder, named):
    """The override of curate.sources for (name, file, category)."""
    return "curate.sources=[{}]".format(", ".join(f"{{name: {name}, paths: ['{folder / file}'], category: {category}}}"
                                                  for name, file, category in named))


def arguments(sources, root, *more):
    named = [("first", "a.jsonl.gz", "math"), ("second", "b.jsonl", "talk")]
    return ["recipe=curate", f"run.root={root}", listed(sources, named), "curate.on_error=skip",
            f"curate.decontaminate.files=[{sources / 'items.jsonl'}]", "data.seq_len=512", "curate.num_processes=1",
            "data.num_heldout=10", f"data.tokenizer={sources / 'tokenizer.model'}", "model.vocab_size=310",
            "curate.samples_per_shard=64", "mix.unit=samples", "mix.groups={reasoning: [math]}", *more]


@pytest.fixture(scope="module")
def curated(sources, tmp_path_factory):
    root = tmp_path_factory.mktemp("curated")
    return curate(load_recipe(arguments(sources[0], root)))


def dropped(folder):
    return [json.loads(line) for path in sorted((folder / "dropped").iterdir())
            for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_record_is_kept_or_dropped_for_one_reason(sources, curated):
    _, records, flaws = sources
    half = len(records) // 2
    place_of = {("a.jsonl.gz", line): line - 1 for line in range(1, half + 1)}
    place_of |= {("b.jsonl", line): half + line - 1 for line in range(1, len(records) - half + 1)}
    found = {}
    for line in dropped(curated):
        place = place_of[Path(line["file"]).name, line["line"]]
        assert place not in found and line["record"] == records[place]
        found[place] = line
    reasons = {place: line["reason"] for place, line in found.items()}
    aside = {place for place, reason in reasons.items() if reason in ("held_out", "not_drawn")}
    either = {place + 1 if reason == "near_duplicate" and place not in flaws else place: reason
              for place, reason in reasons.items() if place not in aside}
    assert either == flaws and len(either) + len(aside) == len(reasons)
    kept = read_chats([curated / "curated.jsonl"])[0]
    prompts = Counter(example.messages[0].content for example in kept)
    assert prompts == Counter(records[place]["question"] for place in range(len(records)) if place not in reasons)
    for place, line in found.items():
        if line["reason"] in ("exact_duplicate", "near_duplicate"):
            partner = place_of[Path(line["partner"]["file"]).name, line["partner"]["line"]]
            assert abs(partner - place) == 1 and line["score"] >= 0.7
            assert partner in aside or partner not in found
        if line["reason"] == "benchmark_item":
            assert line["partner"] == "items 1" and line["hits"][0][:2] == ["items", "1"]
    malformed = json.loads((next(curated.parent.glob("documents-*")) / "malformed.jsonl").read_text())
    assert malformed["line"] == half + 1 and malformed["file"].endswith("a.jsonl.gz")


def test_the_rows_hold_the_mixture_in_its_shares_and_nothing_held_out(sources, curated):
    _, records, _ = sources
    tokenizer = Tokenizer(curated / "rows" / "tokenizer.model")
    shards, prompts, shares = PackedShards(curated / "rows"), Counter(), []
    kept = {example.messages[0].content for example in read_chats([curated / "curated.jsonl"])[0]}
    category = {record["question"]: "math" if place < len(records) // 2 else "talk"
                for place, record in enumerate(records) if "question" in record}
    for i in range(len(shards.counts)):
        arrays = shards.read(i)
        offsets = np.append(0, np.cumsum(arrays["lengths"]))
        texts = [tokenizer.decode(arrays["tokens"][begin:end])
                 for begin, end in zip(offsets[:-1], offsets[1:], strict=True)]
        questions = [text.split("用户：")[1].split("[unused10]")[0] for text in texts]
        prompts.update(questions)
        shares.append(np.mean([category[question] == "math" for question in questions]))
    assert set(prompts) == kept
    assert all(abs(share - 0.75) < 0.06 for share in shares[:-1]), "3 : 1 in every shard"
    summary = json.loads((curated / "summary.json").read_text())
    mixture = {part["name"]: part for part in summary["mixture"]}
    assert mixture["math"]["wanted"] == 0.75 and mixture["math"]["epochs"] > 1 and mixture["math"]["epochs"] <= 4
    assert sum(prompts.values()) == summary["rows"]["samples"] == sum(p["num_samples"] for p in mixture.values())
    heldout = {example.messages[0].content for example in read_chats([curated / "rows" / "heldout.jsonl"])[0]}
    assert len(heldout) == 10 and not heldout & kept


@pytest.mark.parametrize("more, said", [
    (["data.seq_len=256"], "its rows have seq_len 512, this run 256: set data.seq_len=512"),
    (["data.seq_len=512", "data.tokenizer={other}"], "was packed with another tokenizer than data.tokenizer's"),
    (["data.seq_len=512", "data.train=[{nowhere}]"], "cannot read .*manifest.json"),
], ids=["seq_len", "tokenizer", "nowhere"])
def test_rows_that_do_not_fit_a_run_are_refused_at_once(curated, tmp_path, more, said):
    other = tmp_path / "other.model"
    train_tokenizer([" ".join([*WORDS, "tomato", "tomorrow"])] * 5, 310, other)
    line = ["recipe=sft_direct", f"run.root={tmp_path}", "data.source=packed", f"data.train=[{curated / 'rows'}]",
            "model.vocab_size=310", *(word.format(other=other, nowhere=tmp_path) for word in more)]
    with pytest.raises(ValueError, match=said):
        Plan(load_recipe(line), line)


def contents(folder):
    """Bytes of what a curation leaves, but for times and memory."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
             if path.is_file() and path.name not in ("summary.json", "report.html", "recipe.yaml")}
    summary = json.loads((folder / "summary.json").read_text())
    summary["stages"] = [{name: value for name, value in stage.items() if name != "seconds"}
                         for stage in summary["stages"]]
    del summary["seconds"], summary["peak_memory_gib"]
    return found, summary


def assert_same(folder, other):
    (found, summary), (expected, wanted) = contents(folder), contents(other)
    for files in (found, expected):  # the key is of paths too
        del files["curation.json"], files["done.json"], files[".lock"]
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []
    assert summary == wanted


def command(*words):
    return [sys.executable, "-m", "mindpangu.curate", *words]


def test_killed_again_and_again_it_ends_in_the_same_bytes(sources, curated, tmp_path):
    line = command(*arguments(sources[0], "runs", "curate.num_processes=2", "run.dir=run"))
    # Where it is killed: when these appear, the last of them a shard of several.
    for sign in ("runs/documents-*/texts.bin.partial", "runs/documents-*/benchmarks-*.jsonl*",
                 "runs/documents-*/tokens-*/000000.lengths.npy", "run/rows/00001.shard"):
        process = subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.DEVNULL, start_new_session=True)
        while not list(tmp_path.glob(sign)):
            assert process.poll() is None, f"it ended before {sign} was seen"
            time.sleep(0.001)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "run" / "done.json").exists()
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "run", curated)


@pytest.mark.skipif(not find_spec("ray"), reason="pip install 'mindpangu[ray]'")
def test_ray_leaves_the_same_bytes(sources, curated, tmp_path):
    line = command(*arguments(sources[0], "runs", "curate.num_processes=2", "run.dir=run", "curate.engine=ray"))
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "run", curated)


@pytest.mark.skipif(not find_spec("ray"), reason="pip install 'mindpangu[ray]'")
def test_a_training_can_follow_a_curation_by_ray():
    program = "from mindpangu.data.ray_engine import RayEngine; RayEngine(1); import mindspore.mindrecord"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_changed_threshold_repeats_only_what_comes_after_it(sources, curated, capsys):
    root = curated.parent
    before = {path.name: path.stat().st_mtime_ns for path in next(root.glob("documents-*")).glob("*.jsonl")}
    other = curate(load_recipe(arguments(sources[0], root, "curate.near_duplicates.threshold=0.99")))
    assert other != curated
    after = {path.name: path.stat().st_mtime_ns for path in next(root.glob("documents-*")).glob("*.jsonl")}
    assert before.items() <= after.items() and any(name.startswith("near_duplicates") for name in after.keys() - before)
    assert not any(name.startswith(("exact_duplicates", "benchmarks")) for name in after.keys() - before)
    assert curate(load_recipe(arguments(sources[0], root))) == curated
    assert f"already curated in {curated}" in capsys.readouterr().out


def test_a_full_disk_ends_with_the_path_and_the_same_command_goes_on(sources, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        line = command(*arguments(sources[0], small / "runs", "run.dir=" + str(small / "run")))
        done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 1
        assert "No space left on device" in done.stderr and str(small) in done.stderr and "Traceback" not in done.stderr
        assert not (small / "run" / "done.json").exists()
        subprocess.run(["mount", "-o", "remount,size=64m", small], check=True)
        done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert len(dropped(small / "run")) > 20
    finally:
        subprocess.run(["umount", "-l", small], check=True)


@pytest.mark.parametrize("more, said", [
    (["curate.sources=[{name: a, paths: [nowhere.jsonl]}]"], "source 'a': no file at nowhere.jsonl"),
    (["curate.sources=[{name: a, paths: []}]"], "source 'a' has no paths"),
    (["curate.on_error=raise"], "a.jsonl.gz:"),
    (["curate.stages=[near]"], "curate.stages='near': expected one of"),
    (["+mix.weights={math: 1}"], "mix.weights has none of category talk"),
    (["+mix.weights={math: 1, talk: 1, code: 1}", "mix.on_missing=raise"], "mix has a share of code, of which"),
    (["data.seq_len=8"], "unusable leaves no document"),
    (["curate.zip.budget=5", "curate.zip.compat=repr"], "curate.zip.compat=repr: expected null"),
    (["curate.decontaminate.benchmarks_dir=."], "no benchmark's files"),
    (["scale=1b", "curate.sources=[]", "model.eos_id=4"], "small scales"),
], ids=lambda value: value[:40] if isinstance(value, str) else "")
def test_bad_input_ends_with_what_to_do(sources, tmp_path, monkeypatch, more, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=said.replace("[", r"\[")):
        curate(load_recipe(arguments(sources[0], "runs", *more)))


def test_other_weights_of_a_model_that_annotates_make_another_curation(sources, tmp_path):
    (tmp_path / "model").mkdir()
    refusals = set()
    for weights in (b"before", b"after"):
        (tmp_path / "model" / "model.safetensors").write_bytes(weights)
        with pytest.raises(ValueError, match="not curated yet") as error:
            curate(load_recipe(arguments(sources[0], tmp_path, "curate.annotate.engine=checkpoint",
                                         f"curate.annotate.checkpoint={tmp_path / 'model'}")), may_build=False)
        refusals.add(str(error.value))
    assert len(refusals) == 2, "they name the folder"


def test_a_folder_of_something_else_is_refused(sources, curated, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else than a curation"):
        curate(load_recipe(arguments(sources[0], tmp_path / "runs")), tmp_path)
    with pytest.raises(ValueError, match="holds another curation"):
        curate(load_recipe(arguments(sources[0], tmp_path / "runs", "data.num_heldout=11")), curated)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_two_at_a_time_in_one_folder_are_refused(sources, tmp_path):
    from mindpangu.runtime.checkpoint import lock_folder

    with lock_folder(tmp_path / "run"), pytest.raises(ValueError, match="is in use by another run"):
        curate(load_recipe(arguments(sources[0], tmp_path / "runs")), tmp_path / "run")


def test_order_of_the_sources_changes_no_survivor_but_which_copy_stays(sources, curated, tmp_path):
    folder, _, _ = sources
    line = arguments(folder, tmp_path / "runs")
    kept = []
    for files in (("a.jsonl.gz", "b.jsonl"), ("b.jsonl", "a.jsonl.gz")):
        more = [listed(folder, [(file[0], file, "all") for file in files]), "data.num_heldout=1"]
        found = curate(load_recipe([*line, *more]))
        kept.append(len(read_chats([found / "curated.jsonl"])[0]))
        shutil.rmtree(found)
    assert kept[0] == kept[1]


class Labels(BaseHTTPRequestHandler):
    """A server that rates each document 5, those with w7 in them 1, and counts the requests."""

    def do_POST(self):
        self.server.count += 1
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        texts = re.findall(r"<document (\d+) (\w+)>\n(.*?)\n</document \1 \2>", body["messages"][1]["content"],
                           re.DOTALL)
        labels = {number: {"subcategory": "science", "question_type": "open", "verifiable": None, "hops": 3,
                           "quality": 1 if "w7" in text.split() else 5} for number, _, text in texts}
        data = json.dumps({"choices": [{"message": {"content": json.dumps(labels)}, "finish_reason": "stop"}],
                           "usage": {"prompt_tokens": 100, "completion_tokens": 10}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def test_a_model_behind_a_server_and_a_students_pass_rates_say_what_stays(sources, tmp_path, capsys):
    folder, records, _ = sources
    rates = tmp_path / "rates"
    rates.mkdir()
    known = list(dict.fromkeys(record["question"].casefold() for record in records[2:40]))
    (rates / "pass_rates.jsonl").write_bytes(b"".join(
        json_line({"prompt": question, "passed": place % 5, "samples": 4}) for place, question in enumerate(known)))
    with ThreadingHTTPServer(("127.0.0.1", 0), Labels) as server:
        server.count = 0
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        line = arguments(folder, tmp_path / "runs", "curate.annotate.engine=openai", "curate.filter.min_rating=3",
                         f"curate.annotate.url=http://127.0.0.1:{server.server_address[1]}/v1",
                         f"curate.annotate.pass_rates={rates}", "curate.filter.min_complexity=0.2",
                         "curate.annotate.prompt_price=3")
        found = curate(load_recipe(line))
        asked = server.count
        said = capsys.readouterr().out
        curate(load_recipe([*line, "curate.filter.min_rating=2"]))
        assert server.count == asked > 0, "labels are kept"
        server.shutdown()
    assert re.search(r"annotated 262/262 documents, 0 without the model, 3,300 tokens read and 330 written, cost", said)
    lines = [one for one in dropped(found) if one["stage"] == "attributes"]
    bad = {one["record"]["question"] for one in lines if one["reason"] == "low_quality"}
    easy = {one["record"]["question"].casefold() for one in lines if one["reason"] == "too_easy"}
    kept = read_chats([found / "curated.jsonl"])[0]
    assert len(bad) > 20
    assert not any("w7" in f"{example.messages[0].content} {example.messages[1].content}".split() for example in kept)
    always = {question for place, question in enumerate(known) if place % 5 == 4}
    assert easy and easy <= always and not always & {example.messages[0].content.casefold() for example in kept}
    labelled = [json.loads(line)["attributes"] for line in (found / "curated.jsonl").read_text("utf-8").splitlines()]
    assert {one["rating"] for one in labelled} == {5} and {one["hops"] for one in labelled} == {3}
    assert {one["complexity"] for one in labelled} <= {None, 1.0, 0.75, 0.5, 0.25}
    assert any(one["complexity"] is not None for one in labelled)


DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"


@pytest.mark.skipif(not DATA.is_dir(), reason="the benchmarks' files are not here")
def test_real_sources_lose_every_item_of_the_benchmarks_that_they_hold(tmp_path):
    named = [("gsm8k", "gsm8k/test.jsonl", "question, answer"), ("mbpp", "mbpp/mbpp.jsonl", "text, code"),
             ("ifeval", "ifeval/input_data.jsonl", "prompt"), ("math500", "math500/math500.jsonl", "prompt, answer"),
             ("train", "gsm8k/train.jsonl", "question, answer")]
    written = ", ".join(f"{{name: {name}, paths: ['{DATA / file}'], fields: [{fields}]}}"
                        for name, file, fields in named)
    found = curate(load_recipe(["recipe=curate", f"run.root={tmp_path}", f"curate.sources=[{written}]",
                                f"curate.decontaminate.benchmarks_dir={DATA}", "data.seq_len=1024"]))
    lines = dropped(found)
    hit = Counter((line["source"], line["partner"].split()[0]) for line in lines if line["reason"] == "benchmark_item")
    by_source = Counter()
    for (source, _), count in hit.items():
        by_source[source] += count
    items = list_items(DATA)[0]
    for name in ("gsm8k", "math500", "ifeval"):  # shorter ones are looked for as whole documents only
        words = hash_words([item.text for item in items if item.benchmark == name])
        assert by_source[name] == (np.diff(words.starts_D1) >= CONTAINED_WORDS).sum()
    assert 500 <= by_source["mbpp"] < 974, "those of the test split; the training tasks stay"
    assert by_source["train"] < 40, "GSM8K's own training problems are no test items"
    assert json.loads((found / "summary.json").read_text())["documents"] == 1319 + 974 + 541 + 500 + 7473
