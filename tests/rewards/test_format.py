"""Oracle: the rules by hand; the counter of markers is a table of the tests' own."""

import time

import pytest

from mindpangu.data.documents import Example, Message
from mindpangu.rewards.format import check_format
from mindpangu.rewards.score import Response

MESSAGES = (Message("user", "Do it."), Message("assistant", ""))
MATH = Example(MESSAGES, "14", task_type="math")
CODE = Example(MESSAGES, tests=("assert f(1) == 2",), task_type="code")
PREFERENCE = Example(MESSAGES, task_type="preference")
BLOCK = "```python\ndef f(x):\n    return x + 1\n```"


def count(content):
    """Final-answer markers of these tests: "####" and nothing else."""
    return content.count("####")


@pytest.mark.parametrize(("problem", "content", "reason"), [
    (MATH, "7 + 7\n#### 14", None), (MATH, "#### 15", None), (MATH, "14", "no_answer"),
    (MATH, "#### 13, no\n#### 14", "several_answers"), (MATH, BLOCK, "no_answer"), (MATH, "", "empty"),
    (CODE, BLOCK, None), (CODE, f"So:\n\n{BLOCK}\nDone.", None), (CODE, "```\nx = 1\n```", None),
    (CODE, "```\n\n```\n" + BLOCK, None), (CODE, "  ```py\n  x = 1\n  ```", None), (CODE, "def f(x): ...", "no_code"),
    (CODE, "```python\n```", "no_code"), (CODE, "```python\n  \n\n```", "no_code"),
    (CODE, "```python\nx = 1", "no_code"), (CODE, "inline `x = 1` only", "no_code"), (CODE, "#### 14", "no_code"),
    (CODE, " \n", "empty"),
    (CODE, "~~~python\nx = 1\n~~~", None), (CODE, "````md\n```py\n```\n````", None),
    (CODE, "~~~python\nx = 1\n```", "no_code"), (CODE, "````\nx = 1\n```", "no_code"),
    (PREFERENCE, "Once upon a time", None), (PREFERENCE, "#### 1 #### 2", None), (PREFERENCE, "\n \t", "empty"),
])
def test_the_form_of_an_answer_that_ended(problem, content, reason):
    assert check_format(problem, Response(content), count) == reason
    assert check_format(problem, Response(content, thoughts="hm #### 1 #### 2 ```"), count) == reason
    assert check_format(problem, Response(content, thoughts=""), count) == reason


@pytest.mark.parametrize("problem", [MATH, CODE, PREFERENCE])
@pytest.mark.parametrize("content", ["#### 14", BLOCK, "", "Once"])
def test_an_answer_that_did_not_end_is_truncated_whatever_it_holds(problem, content):
    assert check_format(problem, Response(content, ended=False), count) == "truncated"


def test_thoughts_that_were_never_closed_leave_an_empty_answer():
    for problem in (MATH, CODE, PREFERENCE):
        assert check_format(problem, Response("", thoughts="The answer is #### 14 and it ends here"), count) == "empty"


@pytest.mark.parametrize(("problem", "content", "reason"), [
    (Example(MESSAGES, "14"), "no marker", "no_answer"), (Example(MESSAGES, "14"), "#### 14", None),
    (Example(MESSAGES, tests=("assert 1",)), "no block", "no_code"),
    (Example(MESSAGES, "14", ("assert 1",)), BLOCK, None), (Example(MESSAGES), "anything", None),
])
def test_a_problem_without_a_task_type_has_that_of_what_verifies_it(problem, content, reason):
    assert check_format(problem, Response(content), count) == reason


@pytest.mark.parametrize("content", [
    "".join("`" * n + "\n" for n in range(600, 2, -1)), "```\n~~~\n" * 20_000, "```x" * 50_000, "`" * 200_000,
    "```\n" + "\n " * 50_000, "\n" + " " * 200_000, "```\n\n" * 20_000 + " " * 50_000])
def test_any_answer_is_checked_in_a_moment(content):
    started = time.process_time()
    check_format(CODE, Response(content), count)
    assert time.process_time() - started < 2
