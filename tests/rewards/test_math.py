"""Oracle: answers graded by hand."""
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mindpangu.rewards.math import extract_final_answer, score


@pytest.mark.parametrize(("value", "response"), [
    ("14", "12+5=17\n17-3=14\n#### 14"),
    ("14", "####14"),
    ("14", "#### 13\nI slipped.\n#### 14"),
    ("1200", "#### $1,200"),
    ("1,200", "so \\boxed{1200} dollars"),
    ("14", "#### 14 apples."),
    ("14", "最后\n#### 14个"),
    ("0.5", "\\boxed{\\frac{1}{2}}"),
    ("-3", "#### −3.0"),
    ("50", "The answer is 50%."),
    ("50", "\\boxed{50\\%}"),
    ("14", "答案：14。"),
    ("14", "答案是14个苹果"),
    ("14", "The answer is **14**, since 17 - 3 = 14."),
    ("14", "The answer is $14."),
    ("1/3", "#### 2/6"),
    ("14", "\\boxed{3} then \\boxed{\\text{14 apples}}"),
    ("14", "The answer is 3.\n#### 14\nThe answer is 4."),
])
def test_right_answer_scores_one(value, response):
    assert score(value, response) == 1.0


@pytest.mark.parametrize(("value", "response"), [
    ("14", ""),
    ("14", "14"),
    ("14", "#### 14\n#### 15"),
    ("14", "#### 14 or 15"),
    ("14", "#### 14 15"),
    ("14", "#### 1 4"),
    ("14", "#### 14.01"),
    ("14", "#### 17-3"),
    ("14", "#### -14"),
    ("14", "#### 14e2"),
    ("14", "#### 14²"),
    ("14", "\\boxed{14"),
    ("14", "#### 14/0"),
    ("12", "#### 1,2"),
    ("14", "#### fourteen"),
    ("14", "\\boxed{}"),
])
def test_wrong_missing_or_ambiguous_answer_scores_zero(value, response):
    assert score(value, response) == 0.0


def test_extraction_prefers_the_final_line_then_the_box_then_the_phrase():
    assert extract_final_answer("answer is 1 \\boxed{2}\n#### 3") == "3"
    assert extract_final_answer("answer is 1 \\boxed{2}") == "2"
    assert extract_final_answer("answer is 1 apple. Really") == "1 apple"
    assert extract_final_answer("no number here") is None


def test_value_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="value='many'"):
        score("many", "#### 3")


@given(st.text(alphabet="#-+$ \t\n\\boxed{}12,./答案：answer is", max_size=60))
def test_any_text_is_graded_without_an_error(response):
    assert score("12", response) in (0.0, 1.0)


@given(st.integers(-(10**30), 10**30), st.integers(1, 10**30))
def test_every_fraction_equals_itself_expanded_and_differs_from_the_next(numerator, denominator):
    value = f"{numerator}/{denominator}"
    assert score(value, f"#### {3 * numerator}/{3 * denominator}") == 1.0
    assert score(value, f"#### {numerator + 1}/{denominator}") == 0.0


HOSTILE = ["#", "#### ", "####\t-", "\\boxed{", "{", "answer is ", "答案：", "9", "9,", "#### 9", "-", "$ "]


@pytest.mark.parametrize("unit", HOSTILE)
def test_grading_a_million_hostile_characters_is_quick(unit):
    response = unit * (1_000_000 // len(unit))
    start = time.perf_counter()
    score("1", response)
    assert time.perf_counter() - start < 2  # quadratic matching takes minutes
