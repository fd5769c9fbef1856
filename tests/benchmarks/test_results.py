"""One number for each benchmark, and the table beside the papers': hand-worked numbers, the papers' own averages."""

import math

import pytest

from mindpangu.benchmarks.harness import PRESETS, decoding, summarize
from mindpangu.benchmarks.results import as_html, as_text, describe_tasks, layout, read_published
from mindpangu.benchmarks.tasks import Benchmark, forms
from mindpangu.config import EvalConfig
from mindpangu.rewards.score import Score


@pytest.mark.parametrize("form", ["instruct", "base"])
def test_published_rows_have_the_printed_averages(form):
    """The averages are printed, too: a mistyped number would show. Both papers' tables round to two digits."""
    systems, rows = read_published(form)
    printed = rows.pop("Average")["scores"]
    assert len(rows) == 11 and set(printed) == set(systems)
    for system in systems:
        mean = sum(row["scores"][system][0] for row in rows.values()) / 11
        assert mean == pytest.approx(printed[system][0], abs=0.0051), system


def test_published_rows_are_those_of_the_benchmarks():
    for form, benchmarks in forms().items():
        _, rows = read_published(form)
        assert [b.published for b in benchmarks.values() if b.published] == [row for row in rows if row != "Average"]


def sample(item, value, subject=None, reason=None, filter_name="graded"):
    return {"filter": filter_name, "doc_id": item, "doc": {"subject": subject} if subject else {}, "score": value,
            "filtered_resps": [Score(value, {}, reason) if reason else "text"]}


GRADED = Benchmark("gsm8k", list, "score", "graded")


def test_a_share_of_items_has_its_standard_error():
    found = summarize(GRADED, [[[sample(i, float(i < 3), reason="correct" if i < 3 else "wrong_answer")
                                 for i in range(4)] + [sample(0, 1.0, filter_name="other")]]])
    assert (found["score"], found["k"], found["N"], found["items"]) == (75.0, 3, 4, 4)
    # Standard deviation of 1, 1, 1, 0 with n - 1: 1/2; of the mean of four: 1/4.
    assert found["stderr"] == pytest.approx(25.0)
    assert found["reasons"] == {"correct": 3, "wrong_answer": 1} and found["subjects"] == {}


def test_repeats_are_averaged_within_an_item():
    """541 items three times are k/1623; the error is that of the items' means."""
    repeats = [[sample(0, 1.0), sample(1, 0.0)], [sample(0, 1.0), sample(1, 0.0)], [sample(0, 1.0), sample(1, 1.0)]]
    found = summarize(GRADED, [repeats])
    assert (found["k"], found["N"], found["items"]) == (4, 6, 2)
    assert found["score"] == pytest.approx(100 * 4 / 6)
    assert found["stderr"] == pytest.approx(100 * math.sqrt(((1 - 2 / 3) ** 2 + (1 / 3 - 2 / 3) ** 2) / 2))


def test_macro_averages_weigh_subjects_alike():
    one_task = [[[sample(i, 1.0, "law") for i in range(3)] + [sample(3, 0.0, "logic")]]]
    two_tasks = [[[sample(i, 1.0) for i in range(3)]], [[sample(0, 0.0)]]]
    for samples in (one_task, two_tasks):
        assert summarize(GRADED, samples)["score"] == 75.0
        macro = summarize(GRADED._replace(average="macro"), samples)
        assert macro["score"] == 50.0 and sorted(macro["subjects"].values()) == [0.0, 100.0]


def test_presets_are_the_papers_and_give_way_to_what_is_set():
    assert decoding(EvalConfig()) == {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 8 * 1024, "num_repeats": 1}
    sampled = {"temperature": 0.7, "top_p": 1.0, "max_new_tokens": 28 * 1024, "num_repeats": 3}
    assert decoding(EvalConfig(preset="sampled_28k_mean3")) == sampled
    assert decoding(EvalConfig(preset="sampled_28k_mean3", max_new_tokens=64, num_repeats=2)) == sampled | {
        "max_new_tokens": 64, "num_repeats": 2}
    assert PRESETS["task"]["max_new_tokens"] == 0


def measured(**scores):
    return {"form": "instruct", "measured": {"generate_until": {"cut_prompts": 2}},
            "model": {"folder": "runs/student", "device": "CPU", "precision": "float32"},
            "decoding": decoding(EvalConfig()), "benchmarks": {
        name: {"score": score, "stderr": 1.25, "k": 7, "N": 10, "items": 10} for name, score in scores.items()}}


def test_the_table_has_the_papers_rows_and_averages_over_the_same_ones():
    head, rows = layout(measured(mbpp=10.0, gsm8k=50.0, mmlu=40.0))
    assert [row[1] for row in rows] == ["MMLU", "GSM8K", "MBPP", "average of 2"]
    by_name = {row[1]: dict(zip(head, row, strict=True)) for row in rows}
    assert (by_name["GSM8K"]["this model"], by_name["GSM8K"]["k / N"], by_name["GSM8K"]["V1.1"]) == ("50.00", "7 / 10",
                                                                                                     "82.76")
    assert by_name["GSM8K"]["Qwen2.5-1.5B"] == "73.20*" and by_name["MBPP"]["V1"] == "–"
    average = by_name["average of 2"]
    assert average["this model"] == "45.00"
    assert average["KD"] == f"{(67.28 + 77.33) / 2:.2f}" and average["V1"] == f"{(60.72 + 66.72) / 2:.2f}"


def test_text_and_html_say_what_was_measured_and_what_limits_the_numbers():
    results = measured(gsm8k=50.0, drop=1.0)
    for text in (as_text(results), as_html(results)):
        assert "GSM8K: 10 of 1319 items." in text and "2 prompts were longer" in text
        assert "This model: runs/student, CPU, float32; decoding: greedy, up to 8192 tokens." in text
        assert "DROP: unrun on real data" in text and "P1 table 4" in text and "P2 table 1" in text
    assert as_html(results).count("<tr>") == 4 and "k / N" in as_html(results)
    sampled = as_text(results | {"decoding": decoding(EvalConfig(preset="sampled_28k_mean3"))})
    assert "decoding: temperature 0.7, top-p 1, mean of 3, up to 28672 tokens." in sampled
    assert "decoding: greedy, as long as each task says." in as_text(
        results | {"decoding": decoding(EvalConfig(preset="task"))})


def test_the_list_of_tasks_names_files_sources_and_licences(tmp_path):
    text = describe_tasks(tmp_path)
    for words in ("gpqa/gpqa_diamond.csv", "MISSING", "never to show its questions online", "not for commercial use",
                  "cmmlu  (CMMLU; instruct, base)", "unrun on real data", "nothing is ever fetched"):
        assert words in text
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k/test.jsonl").write_text("{}")
    assert "gsm8k/train.jsonl, gsm8k/test.jsonl   MISSING: gsm8k/train.jsonl\n" in describe_tasks(tmp_path)
