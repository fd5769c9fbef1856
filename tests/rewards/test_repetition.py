"""Oracle: hand-worked counts, a definition by brute force, and reference answers of data sets."""

import gzip
import json
import random
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mindpangu.data.arithmetic import make_problems, to_example
from mindpangu.rewards.repetition import length_penalty, line_repetition, ngram_repetition

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
WORDS = st.lists(st.sampled_from(["a", "b", "cc", "d.", "é"]), max_size=40)


@pytest.mark.parametrize(("text", "n", "share"), [
    ("", 2, 0), ("a", 2, 0), ("a b", 2, 0),
    ("a b a b", 2, 1 / 3),  # ab ba ab
    ("a b a b a b", 2, 3 / 5),  # ab ba ab ba ab
    ("a\n b\ta  b", 2, 1 / 3),
    ("a b c a b d", 3, 0),
    ("a a a a", 1, 3 / 4),
    ("ab ab. ab", 1, 1 / 3),
    ("好好好好", 2, 2 / 3),
    ("你好，你好。", 2, 1 / 5),  # 你好 好， ，你 你好 好。
    ("答案ok答案", 2, 1 / 4),  # 答案 案ok ok答 答案
    ("らりらり", 2, 1 / 3),
])
def test_the_share_of_ngrams_that_stood_before(text, n, share):
    assert ngram_repetition(text, n) == pytest.approx(share)


@pytest.mark.parametrize(("text", "share"), [
    ("", 0), ("\n \n", 0), ("one", 0), ("one\ntwo", 0), ("one\none", 1 / 2), ("one\n\n  one \r\n\none", 2 / 3),
    ("a\nb\na\nb\na", 3 / 5), ("one One", 0),
])
def test_the_share_of_lines_that_stood_before(text, share):
    assert line_repetition(text) == pytest.approx(share)


@pytest.mark.parametrize("loop", ["so we get 3; ", "and so on and on, ", "所以答案是十二。", "The answer is 4.\n"])
def test_a_loop_comes_near_one(loop):
    assert ngram_repetition(loop * 300) > 0.98
    assert line_repetition("\n".join([loop] * 100)) == 0.99


def test_a_beginning_that_is_sound_counts_with_its_length():
    sound = " ".join(str(i) for i in range(1000))
    assert 0.45 < ngram_repetition(sound + " again and again" * 333) < 0.55


@given(WORDS, st.integers(1, 5))
def test_it_is_the_definition(words, n):
    ngrams = [tuple(words[i:i + n]) for i in range(len(words) - n + 1)]
    seen_before = sum(ngrams[i] in ngrams[:i] for i in range(len(ngrams)))
    assert ngram_repetition(" ".join(words), n) == pytest.approx(seen_before / max(1, len(ngrams)))
    lines = sum(words[i] in words[:i] for i in range(len(words)))
    assert line_repetition("\n\n".join(words)) == pytest.approx(lines / max(1, len(words)))


@given(st.text(), st.integers(1, 12))
def test_any_text_has_a_share_below_one_that_saying_it_again_does_not_lower(text, n):
    for measure in (lambda text: ngram_repetition(text, n), line_repetition):
        once, twice = measure(text), measure(f"{text}\n{text}")
        assert 0 <= once < 1 and 0 <= twice < 1 and twice >= once - 1e-12


def test_reference_answers_have_next_to_none():
    replies = [to_example(problem, "reasoning").messages[-1] for problem in make_problems(300, seed=0)]
    for texts in ([reply.thoughts for reply in replies], [reply.content for reply in replies]):
        assert sum(map(ngram_repetition, texts)) / len(texts) < 0.01


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
def test_real_reference_answers_have_next_to_none():
    gsm8k = [json.loads(line)["answer"] for line in (SHARED / "gsm8k" / "train.jsonl").read_text().splitlines()]
    shares = [ngram_repetition(answer) for answer in gsm8k]
    assert sum(shares) / len(shares) < 0.001 and sum(share > 0 for share in shares) / len(shares) < 0.02
    assert max(map(line_repetition, gsm8k)) == 0
    with gzip.open(SHARED / "humaneval" / "HumanEval.jsonl.gz") as file:
        programs = [json.loads(line)["canonical_solution"] for line in file]
    assert sum(map(ngram_repetition, programs)) / len(programs) < 0.002


def test_time_is_linear_in_the_length():
    texts = {size: " ".join(random.Random(0).choices("abcdefgh", k=size)) for size in (50_000, 400_000)}
    seconds = {}
    for size, text in texts.items():
        started = time.perf_counter()
        ngram_repetition(text)
        line_repetition(text.replace(" ", "\n"))
        seconds[size] = time.perf_counter() - started
    assert seconds[400_000] < 8 * 4 * seconds[50_000] and seconds[400_000] < 5


@pytest.mark.parametrize("n", [0, -1])
def test_ngrams_of_no_words_are_refused(n):
    with pytest.raises(ValueError, match=f"n={n}: expected at least 1"):
        ngram_repetition("a b", n)


# DAPO's own setting: at most 20480 tokens, the last 4096 of them punished.
@pytest.mark.parametrize(("num_tokens", "penalty"), [
    (0, 0), (16384, 0), (16385, -1 / 4096), (17408, -0.25), (18432, -0.5), (20479, -4095 / 4096), (20480, -1),
    (30000, -1)])
def test_the_length_penalty_is_that_of_dapo(num_tokens, penalty):
    assert length_penalty(num_tokens, 16384, 20480) == penalty


@given(st.integers(0, 200), st.integers(0, 90), st.integers(1, 60))
def test_the_length_penalty_falls_from_zero_to_minus_one(num_tokens, soft_limit, buffer):
    penalty = length_penalty(num_tokens, soft_limit, soft_limit + buffer)
    assert -1 <= penalty <= 0 and length_penalty(num_tokens + 1, soft_limit, soft_limit + buffer) <= penalty
    assert (penalty == 0) == (num_tokens <= soft_limit)
    assert (penalty == -1) == (num_tokens >= soft_limit + buffer)


@pytest.mark.parametrize(("soft_limit", "max_len"), [(10, 10), (11, 10), (-1, 10)])
def test_limits_in_the_wrong_order_are_named(soft_limit, max_len):
    with pytest.raises(ValueError, match=f"soft_limit={soft_limit}, max_len={max_len}: expected 0 <= soft_limit"):
        length_penalty(5, soft_limit, max_len)
