"""The readers of published files, on the files themselves where they are at hand and on their forms elsewhere."""

from pathlib import Path

import pytest

from mindpangu.benchmarks.files import SOURCES, digest, last_boxed, missing_patterns, read_mmlu

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.mark.skipif(not REAL.is_dir(), reason="no published benchmarks are at hand")
@pytest.mark.parametrize("name", [name for name, source in SOURCES.items() if source.run])
def test_published_files_have_the_published_number_of_items(name):
    splits = SOURCES[name].read(REAL)
    scored = splits.get("test") or splits.get("validation") or splits["train"]
    assert len(scored) == SOURCES[name].num_items


@pytest.fixture(scope="module")
def own(own_items, tmp_path_factory):
    return own_items(tmp_path_factory.mktemp("own"))


def test_items_of_every_form_are_read(own):
    sizes = {name: {split: len(documents) for split, documents in source.read(own).items()}
             for name, source in SOURCES.items() if not source.run}
    assert sizes == {"cmmlu": {"dev": 67 * 6, "test": 67 * 2}, "ceval": {"dev": 52 * 5, "val": 52 * 3},
                     "cluewsc": {"train": 5, "test": 4}, "math": {"train": 5, "test": 3},
                     "drop": {"train": 12, "validation": 12}, "gpqa_diamond": {"test": 5},
                     "hellaswag": {"train": 12, "validation": 3}}


def test_choices_of_gpqa_turn_and_the_right_one_stays_right(own):
    documents = SOURCES["gpqa_diamond"].read(own)["test"]
    assert [document["choices"][document["answer"]] for document in documents] == ["right"] * 5
    # OpenCompass counts from 1: the first question has the order BCDA.
    assert documents[0]["choices"] == ["wrong 1", "wrong 2", "wrong 3", "right"]
    assert [document["answer"] for document in documents] == [3, 2, 1, 0, 3]
    assert documents[0]["question"] == "Question 0,\nwith a line break?"


def test_mmlu_is_read_with_and_without_a_header(tmp_path, write_csv):
    question = ["What is 1, plus 1?", "1", "2", "3", "4"]
    head = ["question", "choice0", "choice1", "choice2", "choice3", "answer"]
    for name, rows in (("a", [[*question, "B"]]), ("b", [head, [*question, "1"]])):
        for split in ("dev", "test"):
            write_csv(tmp_path / f"mmlu/{split}/{name}_{split}.csv", rows)
    expected = {"question": question[0], "choices": question[1:], "answer": 1}
    assert read_mmlu(tmp_path)["test"] == [expected | {"subject": "a"}, expected | {"subject": "b"}]


@pytest.mark.parametrize(("text", "expected"), [
    (r"so $\boxed{3}$", "3"), (r"\boxed{1}, then \boxed{\text{a{b}}}", r"\text{a{b}}"), (r"$\boxed 12$.", "12"),
    (r"\fbox{\frac{1}{2}}", r"\frac{1}{2}"), ("nothing", ""), (r"cut off: \boxed{1", ""), (r"\boxed{3} {4}", "3")])
def test_the_last_box_is_the_answer_of_a_solution(text, expected):
    assert last_boxed(text) == expected


def test_a_broken_file_is_named(tmp_path, write_csv):
    write_csv(tmp_path / "ceval/dev/law_dev.csv", [["id", "question", "A", "B", "C", "answer"]])
    with pytest.raises(ValueError, match="law_dev.csv has the columns .*expected D among them"):
        SOURCES["ceval"].read(tmp_path)
    (tmp_path / "humaneval").mkdir()
    (tmp_path / "humaneval/HumanEval.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match="HumanEval.jsonl.gz.*fetch it again"):
        SOURCES["humaneval"].read(tmp_path)
    with pytest.raises(ValueError, match="gpqa_diamond.csv does not exist.*--list-tasks"):
        SOURCES["gpqa_diamond"].read(tmp_path)


def test_a_line_separator_within_a_text_ends_no_line(tmp_path, write_jsonl):
    line = {"question": "one\u2028two", "answer": "#### 1"}
    for split in ("train", "test"):
        write_jsonl(tmp_path / f"gsm8k/{split}.jsonl", [line])
    assert SOURCES["gsm8k"].read(tmp_path) == {"train": [line], "test": [line]}


def test_missing_files_and_changed_bytes_are_noticed(own, own_items, tmp_path):
    assert missing_patterns(SOURCES["drop"], own) == []
    assert missing_patterns(SOURCES["drop"], tmp_path) == list(SOURCES["drop"].patterns)
    before = digest(SOURCES["cluewsc"], own)
    own_items(tmp_path)
    assert digest(SOURCES["cluewsc"], tmp_path) == before
    path = tmp_path / "cluewsc/test_public.json"
    path.write_text(path.read_text().replace("true", "false", 1))
    assert digest(SOURCES["cluewsc"], tmp_path) != before
