"""Oracle: a reader of the questions, written apart from the generator, that solves them from their key words."""
import re
import time

import pytest

from mindpangu.data.arithmetic import make_problems, to_example
from mindpangu.rewards.math import extract_final_answer

OPERATORS = {
    "+": re.compile(r"more\b|又买|又找到|又得到|又放进|又带来"),
    "-": re.compile(r"gives away|loses|sells|taken out|borrows|送出|丢了|卖掉|拿走|借走"),
    "*": re.compile(r"times|multiplied|乘以|倍"),
}
IRRELEVANT = re.compile(r"sunny|red|years old|天气|红色|岁")


def solve(question):
    """Values after the start and after each step."""
    sentences = [sentence for sentence in re.split(r"(?<=[.?。？])\s*", question) if sentence]
    values = []
    for sentence in sentences[:-1]:
        if IRRELEVANT.search(sentence):
            continue
        number = int(re.search(r"\d+", sentence)[0])
        if not values:
            values.append(number)
            continue
        (operator,) = [name for name, words in OPERATORS.items() if words.search(sentence)]
        values.append({"+": values[-1] + number, "-": values[-1] - number, "*": values[-1] * number}[operator])
    return values


@pytest.fixture(scope="module")
def problems():
    return make_problems(4000, seed=7)


def test_every_problem_is_solved_by_its_answer_and_thoughts(problems):
    for problem in problems:
        values = solve(problem.question)
        *equations, last = problem.answer.split("\n")
        assert len(values) - 1 == problem.num_steps == len(equations)
        before = values[0]
        for equation, after in zip(equations, values[1:], strict=True):
            left, right = equation.split("=")
            assert int(re.match(r"\d+", left)[0]) == before
            assert eval(left) == int(right) == after
            before = after
        assert last == f"#### {problem.value}" and int(problem.value) == values[-1]
        assert problem.value == re.findall(r"\d+", problem.thoughts)[-1]
        assert len(re.findall(r"[.。]", problem.thoughts)) == problem.num_steps + 1
        assert all(1 <= value <= 99 for value in values)
        assert extract_final_answer(problem.answer) == problem.value


def test_languages_and_numbers_of_steps_come_in_equal_shares(problems):
    for language in ("en", "zh"):
        assert 0.45 < sum(problem.language == language for problem in problems) / len(problems) < 0.55
    for num_steps in (1, 2, 3, 4):
        assert 0.22 < sum(problem.num_steps == num_steps for problem in problems) / len(problems) < 0.28
    irrelevant = sum(bool(IRRELEVANT.search(problem.question)) for problem in problems) / len(problems)
    assert 0.27 < irrelevant < 0.33
    assert {problem.language for problem in make_problems(50, seed=0, language="zh")} == {"zh"}
    assert "".join(problem.question for problem in make_problems(50, seed=0, language="en")).isascii()


def test_a_seed_repeats_itself_and_fewer_problems_are_the_beginning_of_more(problems):
    assert make_problems(4000, seed=7) == problems
    assert make_problems(37, seed=7) == problems[:37]
    assert make_problems(37, seed=8) != problems[:37]


def test_no_question_comes_twice():
    questions = [problem.question for problem in make_problems(40000, seed=3, language="zh")]  # some are drawn twice
    assert len(set(questions)) == len(questions)


def test_train_and_heldout_share_no_chain_of_operations_in_any_language_or_seed():
    train = {problem.answer for seed in (0, 1) for problem in make_problems(10000, seed=seed)}
    heldout = {problem.answer for seed in (0, 2) for problem in make_problems(1000, seed=seed, split="heldout")}
    assert not train & heldout
    assert len(heldout) > 500


def test_words_are_few_enough_for_a_tiny_vocabulary(problems):
    text = " ".join(problem.question + " " + problem.thoughts for problem in problems)
    assert len(set(re.findall(r"[A-Za-z]+", text))) <= 100
    assert len(set(re.findall(r"[\u4e00-\u9fff]", text))) <= 100


def test_dresses_differ_in_what_the_assistant_writes(problems):
    problem = problems[0]
    reasoning, fast, result = (to_example(problem, dress) for dress in ("reasoning", "fast", "result"))
    assert reasoning.messages[-1] == ("assistant", problem.answer, problem.thoughts)
    assert fast.messages[-1] == ("assistant", problem.answer, None)
    assert result.messages[-1] == ("assistant", f"#### {problem.value}", None)
    for example in (reasoning, fast, result):
        assert example.messages[0] == ("user", problem.question, None) and example.value == problem.value


@pytest.mark.parametrize(("arguments", "message"), [
    ({"num_problems": 0}, "num_problems=0"),
    ({"split": "test"}, "split='test'"),
    ({"language": "de"}, "language='de'"),
])
def test_impossible_requests_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_problems(**{"num_problems": 1, "seed": 0, **arguments})


def test_unknown_dress_is_refused(problems):
    with pytest.raises(ValueError, match="dress='plain'"):
        to_example(problems[0], "plain")


def test_sixty_thousand_problems_take_less_than_five_seconds():
    start = time.process_time()
    make_problems(60000, seed=3)
    assert time.process_time() - start < 5
