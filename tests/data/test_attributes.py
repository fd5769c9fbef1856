"""Oracles: attributes by hand, counts in plain Python over real data, and the verifiers themselves."""

import functools
import itertools
import json
import math
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from mindpangu.config import FAULTS, QUESTION_TYPES, SUBCATEGORIES, FilterConfig
from mindpangu.data.attributes import (
    Attributes,
    add_complexity,
    annotate_by_rules,
    count_hops,
    difficulty,
    find_faults,
    find_question_type,
    find_subcategory,
    from_json,
    judge_attributes,
    pass_rates,
    prompt_key,
    quality,
    split_record,
    to_json,
)
from mindpangu.data.sources import Document, Source, detect_language, read_sources, record_text
from mindpangu.rewards.math import MathVerifier
from mindpangu.rewards.repetition import ngram_repetition, repeated_ngrams
from mindpangu.rewards.verifiable import verifiable_by

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
PLAIN = Attributes("arithmetic", "open", "math", 3, "en", 500, 100, 0.0, 0.0, (), 200)
CHAT = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 3?"},
                     {"role": "assistant", "content": "The answer is 5.", "reasoning_content": "2 + 3 = 5"}]}
NATALIA = {"question": "Natalia sold clips to 48 of her friends in April, and half as many in May. How many in all?",
           "answer": "She sold 48/2 = <<48/2=24>>24 clips in May.\nIn all 48+24 = <<48+24=72>>72 clips.\n#### 72"}


def document(record, text=None):
    text = record_text(record) if text is None else text
    return Document(text, record, "s", detect_language(text), None, None, "s.jsonl", 1)


def annotate(record, text=None):
    [attributes] = annotate_by_rules([document(record, text)])
    return attributes


@functools.cache
def real(name, fields=()):
    """(Documents, their attributes) of a file of real data."""
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"{name} of the shared data is not there")
    documents = list(read_sources([Source(name, str(path), fields=fields)]))
    return documents, annotate_by_rules(documents)


# ---- Records ---------------------------------------------------------------------------------------------------------

def test_attributes_of_a_worked_problem():
    text = f"{NATALIA['question']}\n{NATALIA['answer']}"
    assert annotate(NATALIA) == Attributes("arithmetic", "open", "math", 2, "en", len(text), len(text.split()), 0.0,
                                           0.0, (), len(NATALIA["answer"]))


@pytest.mark.parametrize("record, expected", [
    (CHAT, ("Be brief.\nWhat is 2 + 3?", "2 + 3 = 5\nThe answer is 5.", None, ())),
    (NATALIA, (NATALIA["question"], NATALIA["answer"], NATALIA["answer"], ())),
    ({"prompt": "2 + 3?", "answer": 5}, ("2 + 3?", "", "5", ())),
    ({"prompt": "Add.", "tests": ["assert add(1, 2) == 3"]}, ("Add.", "", None, ("assert add(1, 2) == 3",))),
    ({"text": "Add.", "code": "def add(a, b): ...", "test_list": ["assert add(1, 2) == 3"]},
     ("Add.", "def add(a, b): ...", None, ("assert add(1, 2) == 3",))),
    ({"instruction": "Translate.", "input": "Hi", "output": "Salut"}, ("Translate.\nHi", "Salut", None, ())),
    ({"instruction": "Say hi.", "input": "", "output": "Hi"}, ("Say hi.", "Hi", None, ())),
    ({"text": "Once upon a time."}, ("", "", None, ())),
    ({"messages": [{"role": "user", "content": "Hi"}]}, ("Hi", "", None, ())),
    # Records of another form, as a source with fields of its own may have.
    ({"messages": 5, "body": "x"}, ("", "", None, ())), ({"messages": [1]}, ("", "", None, ())),
    ({"question": None, "tests": "no list"}, ("", "", None, ())),
    ({"prompt": "a", "answer": ["b"]}, ("a", "", None, ())),
    ({"messages": [{"content": None}, {"role": "assistant"}]}, ("", "", None, ())),
])
def test_records_of_every_form_are_taken_apart(record, expected):
    assert split_record(record)[:4] == expected
    assert isinstance(annotate(record, "text"), Attributes)


# Of a megabyte that a pattern may stumble over, each in time that grows with its length.
@pytest.mark.parametrize("text", ["", "\0", "\0" * 10, "😀" * 50, "👩‍👩‍👧‍👦 emoji", "中文。" * 20, "\u200d" * 99, *(
    part * (2**20 // len(part)) for part in ("a", " ", "\n", "$", "<a ", "`", "#", "\\(", "1.", "（", "&#", "1 = ",
                                             "> "))],
    ids=lambda text: f"{text[:3]!a} x{len(text)}")
def test_any_text_of_a_megabyte_or_none_has_attributes_of_the_right_types(text):
    chat = {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]}
    for record in (chat, *([{"text": text}, {"prompt": text, "answer": text}] if len(text) < 2**18 else [])):
        a = annotate(record, text)
        assert a.num_chars == len(text) and 0 <= a.ngram_repetition <= 1 and 0 <= a.line_repetition <= 1
        assert a.subcategory in (*SUBCATEGORIES, None) and a.question_type in (*QUESTION_TYPES, None)
        assert set(a.faults) <= set(FAULTS) and ("control_characters" in a.faults) == ("\0" in text)
        assert math.isfinite(quality(a)) and 0 <= difficulty(a) <= 1
        assert from_json(json.loads(json.dumps(to_json(a)))) == a


def test_attributes_survive_json_and_broken_ones_are_named():
    full = PLAIN._replace(faults=("html", "truncated"), complexity=0.25, rating=4, model_error="missing")
    assert from_json(json.loads(json.dumps(to_json(full)))) == full
    for broken in ({}, to_json(full) | {"hop": 1}, {"faults": []}):
        with pytest.raises(ValueError, match="expected subcategory, .*: annotate the documents again"):
            from_json(broken)


# ---- Verifiable ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("answer", ["18", "1,234.5", "-3/4", "$12", "18 apples", "(1, 2]", "x = 5", "B",
                                    r"\frac{\pi}{2}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", "十八个", "Paris",
                                    r"\sin x + \sqrt{2}",
                                    "so it is\n#### 72", "As shown above we have found that \\boxed{7}."])
def test_what_the_maths_verifier_takes_as_an_answer_is_verifiable(answer):
    assert verifiable_by(answer) == "math"


@pytest.mark.parametrize("answer", ["", " ", "\0", "#### ", "x" * 600, "It was a bright cold day in April.", "{{",
                                    "\\foo", "1 2 3 4 5 is what I would say if somebody asked me about it", "2 3\\"])
def test_what_it_cannot_read_is_not(answer):
    assert verifiable_by(answer) is None


def test_answers_judged_here_and_by_the_verifiers_workers_agree():
    answers = ["18", "3/4", r"\frac{1}{2}", "B", "x^2 + 1", "(1, 2)", "{1, 2}", "50%", "5 km", "{{", "\\foo", "", "1/0",
               "x = = 5", "60^\\circ", "2\\sqrt{3}", r"\log_2 8", "52_8"]
    with MathVerifier(num_workers=1) as verifier:
        for answer in answers:
            try:
                verifier.check(SimpleNamespace(value=answer))
                expected = "math"
            except ValueError:
                expected = None
            assert verifiable_by(answer) == expected, answer


@pytest.mark.parametrize("solution, expected", [
    ("2 + 3 = 5. The answer is 5.", "math"), ("所以答案是 12。", "math"), ("so \\boxed{x+1}", "math"),
    ("答案：B", "math"), ("The answer is that you should rest.", None), ("I like trains.", None), ("", None)])
def test_a_reply_is_verifiable_only_if_it_marks_an_answer_that_is_no_prose(solution, expected):
    assert verifiable_by(solution=solution) == expected
    chat = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": solution}]}
    assert annotate(chat, "text").verifiable == expected


@pytest.mark.parametrize("tests, expected", [
    (["assert add(1, 2) == 3"], "code"), (["import math\nassert area(1) == math.pi", "assert area(0) == 0"], "code"),
    (["assert add(1, 2) =="], None), (["assert 1 == 1"], None),
    (["assert add(1, 2) == 3", "x ="], None), (["\0"], None)])
def test_tests_have_to_be_python_that_calls_the_answer(tests, expected):
    assert annotate({"prompt": "Add.", "tests": tests}).verifiable == expected


# ---- What is asked ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("prompt, subcategory, question_type", [
    ("Write a function in Python that adds two numbers.", "code", "code"),
    ("编写一个程序，输出前 10 个质数。", "code", "code"),
    ("Prove that the sum of two even numbers is even.", None, "proof"),
    ("求证：三角形的内角和为 180 度。", "geometry", "proof"),
    ("Translate into French: good morning", "translation", "rewrite"),
    ("把下面的句子翻译成英文：你好", "translation", "rewrite"),
    ("Which planet is largest?\nA. Mars\nB. Venus\nC. Jupiter\nD. Earth", "knowledge", "multiple_choice"),
    ("下列哪个是哺乳动物？（A）鲨鱼（B）鲸（C）青蛙（D）蛇", "knowledge", "multiple_choice"),
    ("Fill in the blank: The capital of France is ____.", "knowledge", "fill_in"),
    ("True or false: water boils at 100 degrees.", None, "true_false"),
    ("Write a poem about autumn.", "writing", "open"),
    ("Please rephrase this email to my boss.", "writing", "rewrite"),
    ("请写一篇关于春天的作文。", "writing", "open"),
    ("What is the probability of rolling two sixes?", "probability", "open"),
    ("Find the derivative of x^2.", "calculus", "open"),
    ("Solve for x: 2x + 3 = 7", "algebra", "open"),
    ("What is the remainder when 100 is divided by 7?", "number_theory", "open"),
    ("What is the capital of Peru?", "knowledge", "open"),
    ("谁写了《红楼梦》？", "knowledge", "open"),
    ("Hello!", None, "open"),
    ("A and B went to C. They met D.", None, "open"),
])
def test_subcategory_and_question_type_by_hand(prompt, subcategory, question_type):
    assert (find_subcategory(prompt), find_question_type(prompt)) == (subcategory, question_type)


def test_word_problems_are_arithmetic_in_both_languages():
    assert find_subcategory("Ann has 3 letters and gets 4 more. How many has she?", "math") == "arithmetic"
    assert find_subcategory("Ann has three apples and buys twice as many.", "math") == "arithmetic"
    assert find_subcategory("小明有三个苹果，又买了五个，一共有几个？", "math") == "arithmetic"
    assert find_subcategory("小明有3个苹果，又买了5个，一共有几个？") != "arithmetic"  # no answer to compare with


# ---- Hops ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("solution, hops", [
    ("", None), ("  \n", None), ("Paris.", 1), ("#### 72", 1),
    ("48/2 = <<48/2=24>>24.\n48+24 = <<48+24=72>>72\n#### 72", 2),
    ("48/2 = 24 clips in May.\nAltogether 48+24 = 72 clips.\n#### 72", 2),
    ("Step 1: read.\nStep 2: think.\nStep 3: write.", 3), ("1. Read it\n2. Think\n3. Write", 3),
    ("All men are mortal. Socrates is a man. Therefore Socrates is mortal.", 1),
    ("It rained, so the road is wet. Because it is wet, cars slow down. I like cars.", 2),
    ("首先求出半径。其次求面积。所以面积是 9π。这是一个故事。", 3), ("因为 a=2，所以 b=3。于是 c=5。", 2),
    ("Use this:\n```python\nx = 1\ny = 2\nz = 3\n```\nIt works.", 1), ("if a == b or a >= b:", 1),
    ("There are so many, 3.5 of them. So what.", 1),
])
def test_hops_by_hand(solution, hops):
    assert count_hops(solution) == hops


def test_hops_of_gsm8k_are_its_equations_with_marks_and_mostly_without():
    documents, attributes = real("gsm8k/train.jsonl")
    marked = [re.findall(r"<<.*?>>", d.record["answer"]) for d in documents]
    assert all(a.hops == max(1, len(m)) for a, m in zip(attributes, marked, strict=True) if m)
    assert all(a.verifiable == "math" for a in attributes) and not any(a.faults for a in attributes)
    unmarked = [count_hops(re.sub(r"<<.*?>>", "", d.record["answer"])) for d in documents]
    near = [abs(hops - len(m)) for hops, m in zip(unmarked, marked, strict=True)]
    assert sum(n == 0 for n in near) > 0.75 * len(near) and sum(n <= 1 for n in near) > 0.9 * len(near)
    assert sum(a.subcategory == "arithmetic" for a in attributes) > 0.9 * len(attributes)


def test_problems_of_mbpp_and_math_are_verifiable():
    _, mbpp = real("mbpp/mbpp.jsonl", ("text", "code"))
    assert {(a.verifiable, a.subcategory, a.question_type, a.hops) for a in mbpp} == {("code", "code", "code", None)}
    assert all(a.verifiable == "math" and a.hops is None for a in real("math500/math500.jsonl")[1])
    assert not any(a.verifiable for a in real("ifeval/input_data.jsonl")[1])


@pytest.mark.parametrize("name, fields", [("gsm8k/train.jsonl", ()), ("mbpp/mbpp.jsonl", ("text", "code")),
                                          ("math500/math500.jsonl", ()), ("ifeval/input_data.jsonl", ())])
def test_the_default_filter_keeps_all_real_documents(name, fields):
    assert {judge_attributes(a, FilterConfig()) for a in real(name, fields)[1]} == {None}


# ---- Form and repetition ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, faults", [
    ("All is well.", ()), ("Tab\tand\r\nline ends, naïve café, 中文，😀.", ()),
    ("caf\ufffd", ("mojibake",)), ("cafÃ©", ("mojibake",)), ("itâ€™s", ("mojibake",)), ("锟斤拷", ("mojibake",)),
    ("SÃO PAULO", ()), ("a\0b", ("control_characters",)), ("a\x1b[0m", ("control_characters",)),
    ("a\x90", ("control_characters",)),
    ("```python\nx\n```\nDone.", ()), ("```python\nx", ("unclosed_fence",)), ("use `a` and ``b``", ()),
    (r"$x^2$ and $\frac{1}{2}$", ()), (r"$x^2 and \frac{1}{2}", ("unbalanced_math",)),
    (r"\(x \frac", ("unbalanced_math",)),
    (r"\[ \frac{1}{2} \\[2pt] \]", ()), (r"\begin{x} \alpha", ("unbalanced_math",)), ("She has $5 and $7 and $9.", ()),
    (r"She has $5. Then $\frac{1}{2}$.", ()), (r"$0 \le x$", ()),
    ("a <b>bold</b> word", ("html",)), ("a&nbsp;b", ("html",)), ("2 < 3 & 4 > 1", ()), ("`<b>` is a tag", ()),
    ("```html\n<b>\n```", ()), ("<<48/2=24>>", ()),
    ("\0<br>\ufffd", ("mojibake", "control_characters", "html")),
])
def test_faults_of_form_by_hand(text, faults):
    assert find_faults(text, "") == faults


@pytest.mark.parametrize("end, is_cut", [("and that is why the", True), ("first,", True), ("it ends here.", False),
                                         ("我们认为这个问题的", True), ("这样就好。", False), ("it costs 5", False),
                                         ("breathe", False), ("x = 2 +", True)])
def test_a_reply_that_breaks_off_is_truncated_unless_it_is_short(end, is_cut):
    long = "A sentence that fills the space. " * 3 + end
    assert find_faults(long, long) == (("truncated",) if is_cut else ())
    assert find_faults(end, end) == () and find_faults(long, "") == ()


def ngram_share(words, n):
    seen, repeated = set(), 0
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    for gram in grams:
        repeated += gram in seen
        seen.add(gram)
    return repeated / len(grams) if grams else 0.0


def test_repetition_is_the_share_of_ngrams_that_stood_before():
    rng = random.Random(0)
    for _, n in itertools.product(range(200), (1, 2, 3, 4, 5, 10)):
        words = [rng.choice("abc") for _ in range(rng.randrange(40))]
        words += words[: rng.randrange(30)] * rng.randrange(3)
        assert repeated_ngrams(words, n) == pytest.approx(ngram_share(words, n))
        assert ngram_repetition(" ".join(words), n) == repeated_ngrams(words, n)
    assert annotate({"text": "春天来了。" * 40}).ngram_repetition > 0.9
    assert annotate({"text": "a\n b\na \n\nb\nc"}).line_repetition == 0.4


# ---- Complexity ------------------------------------------------------------------------------------------------------

def write_rates(folder, rows):
    (folder / "pass_rates.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return pass_rates(folder)


def test_complexity_is_one_minus_the_students_pass_rate_found_by_prompt(tmp_path):
    rates = write_rates(tmp_path, [{"prompt": "What  is 2 + 3?\n", "passed": 6, "samples": 8},
                                   {"prompt": "Twice?", "passed": 1, "samples": 8},
                                   {"prompt": "twice?", "passed": 3, "samples": 8},
                                   {"prompt": "Be brief.\nWhat is 2 + 3?", "passed": 0, "samples": 8}])
    documents = [document({"prompt": prompt, "answer": "5"}) for prompt in ("what is 2 + 3?", "Twice?", "Unknown?")]
    documents += [document(CHAT), document({"text": "What is 2 + 3?"})]
    found = [a.complexity for a in add_complexity(documents, annotate_by_rules(documents), rates)]
    assert found == [0.25, 0.75, None, 1.0, None]
    assert prompt_key("Ａ b") == prompt_key("a  B") != prompt_key("ab")


@pytest.mark.parametrize("row", [{"prompt": "a", "passed": 3, "samples": 2}, {"prompt": 5, "passed": 0, "samples": 1},
                                 {"passed": 0, "samples": 1}, [], {"prompt": "a", "passed": 0, "samples": 0}])
def test_broken_pass_rates_are_named_by_line_and_missing_ones_by_what_makes_them(tmp_path, row):
    with pytest.raises(ValueError, match="has no pass_rates.jsonl: .*mindpangu.rollout recipe=grpo"):
        pass_rates(tmp_path)
    with pytest.raises(ValueError, match=r"pass_rates.jsonl:2: expected .*sample the answers again"):
        write_rates(tmp_path, [{"prompt": "a", "passed": 1, "samples": 2}, row])


# ---- The filter ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change, config, expected", [
    ({}, {}, None), ({"num_chars": 9}, {"min_chars": 10}, ("too_short", 9)),
    ({"num_chars": 10}, {"min_chars": 10}, None),
    ({"num_chars": 11}, {"max_chars": 10}, ("too_long", 11)), ({"num_chars": 10**9}, {}, None),
    ({"language": "ko"}, {"languages": ["en", "zh"]}, ("language", 0)), ({"language": "ko"}, {}, None),
    ({"faults": ("mojibake", "html")}, {}, ("formatting", 1)), ({"faults": ("html",)}, {}, None),
    ({"faults": ("html",)}, {"drop_faults": ["html"]}, ("formatting", 1)),
    ({"faults": ("mojibake",)}, {"drop_faults": []}, None),
    ({"ngram_repetition": 0.51}, {}, ("repetitive", 0.51)), ({"ngram_repetition": 0.5}, {}, None),
    ({"line_repetition": 0.8}, {}, ("repetitive", 0.8)), ({"line_repetition": 0.8}, {"max_line_repetition": 1.0}, None),
    ({"subcategory": None}, {"subcategories": ["algebra"]}, ("subcategory", 0)), ({"subcategory": None}, {}, None),
    ({}, {"question_types": ["proof"]}, ("question_type", 0)), ({}, {"question_types": ["open"]}, None),
    ({"answer_chars": 3}, {"min_answer_chars": 4}, ("short_answer", 3)),
    ({"verifiable": None}, {"verifiable": ["math", "code"]}, ("unverifiable", 0)),
    ({"verifiable": "code"}, {"verifiable": ["math"]}, ("unverifiable", 0)), ({"verifiable": None}, {}, None),
    ({}, {"min_hops": 4}, ("too_few_hops", 3)), ({}, {"max_hops": 2}, ("too_many_hops", 3)),
    ({"hops": None}, {"min_hops": 4, "max_hops": 4}, None), ({}, {"min_hops": 3, "max_hops": 3}, None),
    ({"complexity": 0.0}, {"min_complexity": 0.1}, ("too_easy", 0)),
    ({"complexity": None}, {"min_complexity": 0.1}, None),
    ({"complexity": 1.0}, {"max_complexity": 0.9}, ("too_hard", 1)), ({"complexity": 1.0}, {}, None),
    ({"rating": 2}, {"min_rating": 3}, ("low_quality", 2)), ({"rating": None}, {"min_rating": 3}, None),
])
def test_each_criterion_drops_what_fails_it_and_nothing_else(change, config, expected):
    assert judge_attributes(PLAIN._replace(**change), FilterConfig(**config)) == expected


def test_the_first_criterion_that_fails_is_the_reason():
    everything = FilterConfig(min_chars=1000, languages=["zh"], subcategories=["code"], question_types=["code"],
                              min_answer_chars=1000, verifiable=["code"], min_hops=9, min_complexity=0.5, min_rating=5)
    worst = PLAIN._replace(faults=("mojibake",), ngram_repetition=1.0, complexity=0.0, rating=1)
    repairs = [{"num_chars": 1000}, {"language": "zh"}, {"faults": ()}, {"ngram_repetition": 0.0},
               {"subcategory": "code"}, {"question_type": "code"}, {"answer_chars": 1000}, {"verifiable": "code"},
               {"hops": 9}, {"complexity": 0.5}, {"rating": 5}]
    reasons = []
    for repair in repairs:
        reasons.append(judge_attributes(worst, everything)[0])
        worst = worst._replace(**repair)
    assert reasons == ["too_short", "language", "formatting", "repetitive", "subcategory", "question_type",
                       "short_answer", "unverifiable", "too_few_hops", "too_easy", "low_quality"]
    assert judge_attributes(worst, everything) is None


@pytest.mark.parametrize("bad, message", [
    ({"min_chars": -1}, "curate.filter.min_chars"), ({"min_chars": 9, "max_chars": 8}, "min_chars=9 exceeds"),
    ({"max_line_repetition": 1.5}, "max_line_repetition"), ({"drop_faults": ["typo"]}, "drop_faults='typo'.*mojibake"),
    ({"verifiable": ["maths"]}, "verifiable='maths'"), ({"min_complexity": 0.6, "max_complexity": 0.5}, "exceeds"),
    ({"min_rating": 6}, "min_rating")])
def test_thresholds_that_make_no_sense_are_refused_by_name(bad, message):
    with pytest.raises(ValueError, match=message):
        FilterConfig(**bad)


def test_quality_puts_verifiable_before_rating_and_form_before_repetition_before_length():
    worst_verifiable = PLAIN._replace(faults=FAULTS, ngram_repetition=1.0, answer_chars=0, num_chars=0, rating=1)
    best_other = PLAIN._replace(verifiable=None, answer_chars=10**9, rating=5)
    order = [PLAIN, PLAIN._replace(answer_chars=100), PLAIN._replace(ngram_repetition=0.5),
             PLAIN._replace(faults=("html",)), worst_verifiable, best_other, best_other._replace(rating=None)]
    values = [quality(a) for a in order]
    assert values == sorted(values, reverse=True) and len(set(values)) == len(values)
    assert quality(PLAIN) == 16 + 4 + 1 + 200 / 1200
    assert all(-2 < value < 24 for value in values)


def test_difficulty_is_complexity_where_it_is_known_and_rises_with_hops_elsewhere():
    assert difficulty(PLAIN._replace(complexity=0.25, hops=9)) == 0.25
    assert [difficulty(PLAIN._replace(hops=hops)) for hops in (0, 4, None)] == [0, 0.5, 0.5]
    values = [difficulty(PLAIN._replace(hops=hops)) for hops in range(50)]
    assert values == sorted(set(values)) and values[-1] < 1
