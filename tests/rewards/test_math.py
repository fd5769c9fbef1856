"""Oracles: answers graded by hand, here and in math_cases/; Python's fractions and complex numbers; MATH's answers."""
import cmath
import csv
import json
import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindpangu.data.documents import Example, Message
from mindpangu.rewards.equality import same_answer
from mindpangu.rewards.math import MathVerifier, count_final_answers, extract_final_answer
from mindpangu.rewards.score import Response, Score

CASES = Path(__file__).parent / "math_cases"
MATH500 = Path(__file__).resolve().parents[3] / "shared" / "data" / "math500" / "math500.jsonl"
# Its digits don't fit into any memory, and its factorial holds the interpreter's lock.
TOWER = r"\boxed{\dfrac{5^{(5^{(5^{(5^5)})}-4)}-5}{16}}"
HANGING = r"\boxed{(10^{9})!}"


def problem(value):
    return Example((Message("user", "How much is it?"), Message("assistant", "")), value, task_type="math")


@pytest.fixture(scope="module")
def verifier():
    with MathVerifier(num_workers=2, timeout_s=20) as verifier:
        yield verifier


@pytest.fixture(scope="module")
def score(verifier):
    """score(value, response) -> 1.0 or 0.0"""
    return lambda value, response: verifier.score(problem(value), Response(response)).value


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
def test_right_answer_scores_one(score, value, response):
    assert score(value, response) == 1.0


@pytest.mark.parametrize(("value", "response"), [
    ("14", ""),
    ("14", "14"),
    ("14", "#### 14\n#### 15"),
    ("14", "#### 14 or 15"),
    ("14", "#### 14 15"),
    ("14", "#### 1 4"),
    ("14", "#### 14.01"),
    ("14", "#### -14"),
    ("14", "#### 14e2"),
    ("14", "#### 14²"),
    ("14", "\\boxed{14"),
    ("14", "#### 14/0"),
    ("12", "#### 1,2"),
    ("14", "#### fourteen"),
    ("14", "\\boxed{}"),
])
def test_wrong_missing_or_ambiguous_answer_scores_zero(score, value, response):
    assert score(value, response) == 0.0


def test_extraction_prefers_the_final_line_then_the_box_then_the_phrase():
    assert extract_final_answer("answer is 1 \\boxed{2}\n#### 3") == "3"
    assert extract_final_answer("answer is 1 \\boxed{2}") == "2"
    assert extract_final_answer("answer is 1 apple. Really") == "1 apple"
    assert extract_final_answer("no number here") is None


@given(st.text(alphabet="#-+$ \t\n\\boxed{}12,./答案：answer is", max_size=60))
def test_any_text_is_graded_without_an_error(score, response):
    assert score("12", response) in (0.0, 1.0)


@given(st.integers(-(10**30), 10**30), st.integers(1, 10**30))
def test_every_fraction_equals_itself_expanded_and_differs_from_the_next(score, numerator, denominator):
    value = f"{numerator}/{denominator}"
    assert score(value, f"#### {3 * numerator}/{3 * denominator}") == 1.0
    assert score(value, f"#### {numerator + 1}/{denominator}") == 0.0


HOSTILE = ["#", "#### ", "####\t-", "\\boxed{", "{", "answer is ", "答案：", "9", "9,", "#### 9", "-", "$ "]


@pytest.mark.parametrize("unit", HOSTILE)
def test_grading_a_million_hostile_characters_is_quick(score, unit):
    response = unit * (1_000_000 // len(unit))
    start = time.process_time()
    score("1", response)
    assert time.process_time() - start < 10  # quadratic matching takes minutes


def read_cases(form):
    with open(CASES / f"{form}.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("form", ["integers_and_decimals", "fractions", "latex_expressions", "units", "sets_and_tuples",
                                  "intervals", "equations", "chinese", "choices", "percent_and_money"])
def test_every_case_is_graded_as_by_hand_and_only_listed_right_answers_are_missed(verifier, form):
    """Columns: gold, answer (a whole response), verdict (1: right), missed (why a right answer counts as wrong)."""
    cases = read_cases(form)
    wrong = [case for case in cases if case["verdict"] == "0"]
    assert len({(case["gold"], case["answer"]) for case in cases}) == len(cases) >= 100
    assert len(wrong) >= 0.4 * len(cases)
    assert all(case["verdict"] in "01" and not (case["missed"] and case in wrong) for case in cases)
    differing = []
    for case in cases:
        score = verifier.score(problem(case["gold"]), Response(case["answer"]))
        expected = case["verdict"] == "1" and not case["missed"]
        reasons = {"correct"} if expected else {"wrong_answer", "no_answer"}
        if (score.value, score.parts) != (float(expected), {"correct": float(expected)}) or score.reason not in reasons:
            differing.append((case["gold"], case["answer"], score))
    assert not differing
    num_missed = sum(bool(case["missed"]) for case in cases)
    assert num_missed <= 0.03 * (len(cases) - len(wrong))


def test_every_gold_answer_of_the_cases_passes_the_check_at_the_start(verifier):
    for form in sorted(CASES.glob("*.csv")):
        for gold in {case["gold"] for case in read_cases(form.stem)}:
            verifier.check(problem(gold))


@pytest.mark.parametrize(("value", "message"), [
    (None, "the answer is missing"),
    (" ", "empty"),
    ("1/0", "denominator is zero"),
    (r"\int_0^1 x dx", r"\\int.*unknown"),
    ("x = ", "empty"),
    ("1/2x", "could be"),
    ("5 apples and 3 pears, 2 each", "."),
    ("9" * 501, "501 characters"),
])
def test_a_problem_whose_answer_nothing_could_equal_is_refused_at_the_start(verifier, value, message):
    with pytest.raises(ValueError, match=message):
        verifier.check(problem(value))


@pytest.mark.skipif(not MATH500.is_file(), reason="MATH-500 is not at hand")
def test_every_answer_of_math500_equals_itself_in_four_dresses_and_not_the_next_one(verifier):
    golds = [json.loads(line)["answer"] for line in MATH500.read_text(encoding="utf-8").splitlines()]
    assert len(golds) == 500
    dresses = (r"We get $x$, hence \boxed{%s}.", "计算得到结果。答案：$%s$", "So it is.\n#### %s",
               "The answer is $%s$, which is it.")
    for gold, following in zip(golds, golds[1:] + golds[:1], strict=True):
        verifier.check(problem(gold))
        # Two pairs of neighbours are equal: 7 and 7, 3 and 3; and x=5 follows a 5, which says the same.
        is_same = gold == following or (gold, following) == ("5", "x=5")
        for dress in dresses:
            # A dollar sign within a formula would end it in the last but one.
            shown = [answer.replace("\\$", "") if "$" in dress else answer for answer in (gold, following)]
            graded = [verifier.score(problem(gold), Response(dress.replace("%s", answer))).value for answer in shown]
            assert graded == [1.0, float(is_same)], (gold, following, dress)


# ---- Arithmetic and algebra against Python's own ---------------------------------------------------------------------

def spell_arithmetic(random, depth):
    """(LaTeX, Fraction, how tightly it binds: 0 a sum, 1 a product, 1.5 a mixed number or a power, 2 an atom)."""
    kind = random.random() if depth else 0
    if kind < 0.3:
        number, other = sorted(random.sample(range(1, 10), 2))
        return random.choice([
            (str(number), Fraction(number), 2), (f"0.{number}{other}", Fraction(10 * number + other, 100), 2),
            (rf"\dfrac{{{number}}}{other}", Fraction(number, other), 2),
            (rf"\frac{number}{other}", Fraction(number, other), 2),
            (rf"{other}\frac{{{number}}}{{{other}}}", other + Fraction(number, other), 1.5)])
    left, right = spell_arithmetic(random, depth - 1), spell_arithmetic(random, depth - 1)
    if kind < 0.5:
        second = right[0] if right[2] > 0 else f"({right[0]})"
        return (f"{left[0]} + {second}", left[1] + right[1], 0) if kind < 0.4 else (
            f"{left[0]}-{second}", left[1] - right[1], 0)
    if kind < 0.75:
        first = left[0] if left[2] in (1, 2) else f"({left[0]})"
        second = right[0] if right[2] > 1 else f"({right[0]})"
        product = random.choice([f"{first}({right[0]})", rf"{first}\cdot {second}", rf"{first}\times{second}"])
        return product, left[1] * right[1], 1
    if kind < 0.9:
        return (rf"\frac{{{left[0]}}}{{{right[0]}}}", left[1] / right[1], 2) if right[1] else left
    power = random.randint(0, 3)
    return f"({left[0]})^{{{power}}}", left[1] ** power, 1.5


@pytest.mark.parametrize("seed", range(5))
def test_random_arithmetic_equals_its_fraction_and_no_other(seed):
    rng = random.Random(seed)
    for _ in range(200):
        latex, value, _ = spell_arithmetic(rng, 3)
        other = value + rng.choice([1, -1, Fraction(1, 1000), value or 1])
        assert same_answer(f"{value}", latex)
        assert same_answer(latex, f"{value}")
        assert not same_answer(f"{other}", latex)


def make_algebra(random, depth):
    """A tree of an expression in x, y, k and R."""
    kind = random.random() if depth else 0
    if kind < 0.2:
        return random.choice([random.choice("xykR"), random.randint(1, 9), "\\pi "])
    left, right = make_algebra(random, depth - 1), make_algebra(random, depth - 1)
    if kind < 0.9:
        return random.choice("+-*/"), left, right
    return random.choice(["^", "sqrt", "sin"]), left, 2


def spell_algebra(tree):
    if not isinstance(tree, tuple):
        return str(tree)
    left, right = (spell_algebra(part) for part in tree[1:])
    return {"+": f"({left}+{right})", "-": f"({left}-{right})", "*": rf"{left} \cdot {right}",
            "/": rf"\frac{{{left}}}{{{right}}}", "^": f"({left})^{right}", "sqrt": rf"\sqrt{{{left}}}",
            "sin": rf"\sin({left})"}[tree[0]]


def value_of_algebra(tree, point):
    if not isinstance(tree, tuple):
        return cmath.pi if tree == "\\pi " else point.get(tree, tree)
    left, right = (value_of_algebra(part, point) for part in tree[1:])
    return {"+": lambda: left + right, "-": lambda: left - right, "*": lambda: left * right, "/": lambda: left / right,
            "^": lambda: left**right, "sqrt": lambda: cmath.sqrt(left), "sin": lambda: cmath.sin(left)}[tree[0]]()


def rewritten(random, tree):
    """The same tree with sums and products turned around and powers multiplied out, or with one leaf changed."""
    def turn(tree):
        if not isinstance(tree, tuple):
            return tree
        operator, left, right = tree[0], turn(tree[1]), turn(tree[2])
        if operator == "^":
            return "*", left, left
        if operator == "*" and isinstance(left, tuple) and left[0] == "+":
            return "+", ("*", left[1], right), ("*", left[2], right)
        return (operator, right, left) if operator in "+*" else (operator, left, right)

    def change(tree):
        if not isinstance(tree, tuple):
            return random.choice([leaf for leaf in ("x", "y", "k", "r", 2, 3) if leaf != tree])
        place = 1 if tree[0] in ("^", "sqrt", "sin") else random.choice([1, 2])
        return tuple(change(part) if number == place else part for number, part in enumerate(tree))

    return turn(tree) if random.random() < 0.5 else change(tree)


@pytest.mark.parametrize("seed", range(5))
def test_random_algebra_is_the_same_where_its_values_are(seed):
    rng = random.Random(seed)
    num_same = 0
    for _ in range(60):
        tree = make_algebra(rng, 3)
        other = rewritten(rng, tree)
        agreeing = []
        for _ in range(5):
            point = {name: rng.uniform(0.5, 3) * rng.choice([1, -1]) for name in "xykRr"}
            try:
                values = [value_of_algebra(each, point) for each in (tree, other)]
            except (ZeroDivisionError, OverflowError):
                continue
            if max(map(abs, values)) < 1e9:  # else it was divided by the rounding error of a zero
                agreeing.append(cmath.isclose(*values, rel_tol=1e-9, abs_tol=1e-9))
        if not agreeing:
            continue
        assert same_answer(spell_algebra(tree), spell_algebra(other)) == all(agreeing), (tree, other)
        num_same += all(agreeing)
    assert 10 < num_same < 55


PIECES = [*"xyiBE+-*/^_=<.,;:()[]{}%$|!'&?² ", *"个万三十负或约√", "分之", "百分之", "1", "10", ".5", "1,234", "or",
          "kg", "**", "f(x)", "x_1=", r"\{", r"\}", r"\frac{1}{2}", r"\sqrt", r"\pi", r"\cdot", r"\le", r"\ne", r"\in",
          r"\cup", r"\setminus", r"\pm", r"\infty", r"\text{cm}", r"\text{and}", r"\$", r"\begin{pmatrix}",
          r"\end{pmatrix}", r"\\", r"\boxed{", r"\sin", r"\log_2", r"\binom", r"^\circ", r"\mathbb{R}",
          r"\overline{3}", r"\approx"]
SCRAMBLED = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)


@settings(max_examples=300, deadline=None)
@given(SCRAMBLED, SCRAMBLED)
def test_any_two_texts_are_compared_without_an_error_whatever_space_is_around_them(gold, answer):
    assert same_answer(gold, answer) in (True, False)
    assert same_answer(gold, f"  {answer}\n") == same_answer(gold, answer)


# ---- Which answer counts ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("text", "answer", "count"), [
    ("12+5=17\n#### 14", "14", 1),
    ("#### 14\nthen\n#### 15", "15", 2),
    ("#### Step 3\nso \\boxed{7}", "7", 1),
    ("#### 3. Simplify\n\\fbox{7}", "7", 1),
    ("#### \\boxed{5}", r"\boxed{5}", 1),
    ("The answer is \\boxed{5}.", "5", 1),
    ("答案：\\boxed{18}", "18", 1),
    ("\\boxed{3} then \\boxed{\\frac{1}{2}}", r"\frac{1}{2}", 2),
    ("x = \\boxed{1} or x = \\boxed{-2}.", r"x = \boxed{1} or x = \boxed{-2}", 1),
    ("\\boxed{\\boxed{5}}", r"\boxed{5}", 1),
    ("\\boxed{1 \\boxed{5}", "5", 1),
    ("\\boxed{\\{1, 2\\}}", r"\{1, 2\}", 1),
    ("The answer is $x = 1, 2$, as shown.", "$x = 1, 2$", 1),
    ("The answer is (1, 2], as shown.", "(1, 2]", 1),
    ("The answer is $a, bc$. Done.", "$a, bc$", 1),
    (r"The answer is \text{Mon, Tue}, then.", r"\text{Mon, Tue}", 1),
    ("The answer is 1, -2 and 3.", "1, -2 and 3", 1),
    ("The answer is 3.5. It was easy.", "3.5", 1),
    ("The answer is 3. The answer is 4.", "4", 2),
    ("**Answer:**\n\n14", "14", 1),
    ("所以答案是 18 元，因为有折扣", "18 元", 1),
    ("答：小明一共有18个苹果。", "18个苹果", 1),
    ("选项A错误，选项C正确，故选C。", "C", 1),
    ("The answer is Evelyn.", "Evelyn", 1),
    ("The answer is east of here. The answer is 5.", "5", 1),
    ("the answers to 3 questions", None, 0),
    ("不选B", None, 0),
    ("14", None, 0),
    ("", None, 0),
])
def test_the_final_answer_is_found_and_its_marks_are_counted_once(text, answer, count):
    assert extract_final_answer(text) == answer
    assert count_final_answers(text) == count


@pytest.mark.parametrize("unit", [*HOSTILE, "\\boxed{1}, ", "\\boxed{1} ", "答案", "答：一", "选A", "answer is 1, ",
                                  "####\n", "$", "(1", "}"])
def test_counting_in_many_hostile_characters_is_quick(unit):
    text = unit * (300_000 // len(unit))
    start = time.process_time()
    count_final_answers(text)
    extract_final_answer("\\boxed{" + text)
    assert time.process_time() - start < 10  # quadratic matching takes minutes


# ---- Limits ----------------------------------------------------------------------------------------------------------

def test_a_tower_of_powers_is_wrong_within_the_limit_against_any_gold():
    with MathVerifier(num_workers=1, timeout_s=3) as verifier:
        for gold in ("5", r"\sqrt{2}", "x+1", "(1, 2]", "x=5", r"\text{east}", "B", r"5 \text{ cm}", "1, 2"):
            verifier.check(problem(gold))
            began = time.monotonic()
            assert verifier.score(problem(gold), Response(TOWER)) == Score(0.0, {"correct": 0.0}, "wrong_answer")
            assert time.monotonic() - began < 6


def test_a_hanging_answer_times_out_from_a_thread_while_other_threads_are_served():
    with MathVerifier(num_workers=2, timeout_s=2) as verifier, ThreadPoolExecutor(3) as threads:
        verifier.score(problem(r"\sqrt{8}"), Response(r"\boxed{2\sqrt{2}}"))
        hanging = threads.submit(verifier.score, problem("x+1"), Response(HANGING))
        num_served = 0
        while not hanging.done():
            assert verifier.score(problem(r"\sqrt{8}"), Response(r"\boxed{2\sqrt{2}}")).reason == "correct"
            assert threads.submit(verifier.score, problem("x+1"), Response(r"\boxed{1+x+x}")).result().value == 0.0
            num_served += 1
        assert hanging.result() == Score(0.0, {"correct": 0.0}, "timeout")
        assert num_served > 5
        assert verifier.score(problem("x+1"), Response(r"\boxed{1+x}")).reason == "correct"


def workers():
    """The pids of this process's workers."""
    pids = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            is_worker = b"mindpangu.rewards.math:check_pair" in (folder / "cmdline").read_bytes()
            if is_worker and f"PPid:\t{os.getpid()}\n" in (folder / "status").read_text():
                pids.add(int(folder.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return pids


def test_plain_numbers_need_no_worker():
    before = workers()
    with MathVerifier() as verifier:
        verifier.check(problem("1,200.50"))
        assert verifier.score(problem("1,200.50"), Response("#### 2401/2")).reason == "correct"
        assert verifier.score(problem("1,200.50"), Response("#### 1200.05")).reason == "wrong_answer"
        assert verifier.score(problem("1,200.50"), Response("It is 2401/2.")).reason == "no_answer"
        assert workers() == before


def test_a_worker_killed_in_the_middle_costs_that_answer_only():
    before = workers()
    with MathVerifier(num_workers=1, timeout_s=30) as verifier, ThreadPoolExecutor(1) as threads:
        assert verifier.score(problem("x+1"), Response(r"\boxed{1+x}")).value == 1.0
        hanging = threads.submit(verifier.score, problem("x+1"), Response(HANGING))
        time.sleep(0.5)
        (worker,) = workers() - before
        os.kill(worker, signal.SIGKILL)
        assert hanging.result() == Score(0.0, {"correct": 0.0}, "error")
        assert verifier.score(problem("x+1"), Response(r"\boxed{1+x}")).value == 1.0
    assert workers() <= before
