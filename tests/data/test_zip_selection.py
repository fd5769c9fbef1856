import json
import lzma
import random
import signal
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindpangu.data.zip_selection import State, _Deflate, _Zstandard, select

WORDS = [f"word{n}" for n in range(500)]


def ratio(texts, as_list):
    plain = str(texts).encode() if as_list else "\n".join(texts).encode()
    return len(plain) / len(zlib.compress(plain, 9))


def plain_selection(documents, budget, k1, k2, k3, as_list):
    """The published program with its tie rule and without its faults, every text compressed as a whole."""
    scores = [ratio([document], as_list) for document in documents]
    selected = []
    while len(selected) < min(budget, len(documents)):
        left = [n for n in range(len(documents)) if n not in selected]
        first = sorted(left, key=lambda n: (scores[n], n))[:k1]
        for n in first:
            scores[n] = ratio([documents[m] for m in selected] + [documents[n]], as_list)
        second = sorted(first, key=lambda n: (scores[n], n))[:k2]
        for n in second:
            scores[n] = 1e6
        picks = []
        while len(picks) < min(k3, budget - len(selected), len(second)):
            ratios = {n: ratio([documents[m] for m in picks] + [documents[n]], as_list) for n in second}
            picks.append(min((n for n in second if n not in picks), key=lambda n: (ratios[n], n)))
        selected += picks
    return selected


def sentences(num_documents, seed=0, num_words=(5, 60)):
    rng = random.Random(seed)
    phrases = [" ".join(rng.choices(WORDS, k=rng.randint(2, 6))) for _ in range(60)]
    return [" ".join(rng.choices(phrases, k=rng.randint(*num_words) // 4 + 1)) for _ in range(num_documents)]


@pytest.mark.parametrize("compat", [None, "repr"])
@pytest.mark.parametrize("budget, k1, k2, k3", [(60, 40, 12, 5), (100, 30, 10, 10), (17, 500, 20, 7), (500, 20, 9, 4)])
def test_exact_order_is_the_published_one(budget, k1, k2, k3, compat):
    documents = sentences(120)
    expected = plain_selection(documents, budget, k1, k2, k3, compat == "repr")
    assert select(documents, budget, "zlib_exact", k1, k2, k3, compat=compat).tolist() == expected
    assert sorted(expected) == sorted(set(expected)) and len(expected) == min(budget, 120)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.text(st.sampled_from("ab '\\\n\0学😀"), max_size=12), max_size=14), st.integers(0, 16),
       st.integers(1, 5), st.integers(0, 4), st.integers(0, 6), st.booleans())
def test_exact_order_with_ties_and_odd_texts(documents, budget, k3, more_k2, more_k1, as_list):
    k2, k1 = k3 + more_k2, k3 + more_k2 + more_k1
    ours = select(documents, budget, "zlib_exact", k1, k2, k3, compat="repr" if as_list else None)
    assert ours.tolist() == plain_selection(documents, budget, k1, k2, k3, as_list)


def test_documents_of_any_type_under_repr():
    documents = [{"question": text, "answer": n} for n, text in enumerate(sentences(40))]
    assert select(documents, 20, "zlib_exact", 30, 10, 5, compat="repr").tolist() == plain_selection(
        documents, 20, 30, 10, 5, True)


def test_incremental_deflate_gives_the_bytes_of_the_whole():
    # 300 KB: the window slides many times, and blocks end within the history and within the candidate.
    rng = random.Random(1)
    texts = sentences(1500, 1, (5, 200))
    texts += ["x" * 100_000, "".join(rng.choices("0123456789abcdef", k=90_000)), "", "\0" * 70_000]
    scorer = _Deflate([text.encode() for text in texts], as_list=False)
    for size in (0, 1, 300, 1500):
        history = rng.sample(range(1500), size)
        candidates = [*rng.sample(range(1500), 3), 1500, 1501, 1502, 1503]
        for n, score in zip(candidates, scorer.score(history, candidates), strict=True):
            assert score == ratio([texts[m] for m in [*history, n]], False)


@pytest.mark.parametrize("engine", ["zlib_exact", "zstd"])
def test_a_resumed_selection_and_one_over_processes_are_the_same(engine):
    documents = sentences(150)
    strata = [("en", n % 3 > 0) for n in range(150)]
    arguments = dict(engine=engine, k1=50, k2=20, k3=6, strata_N=strata)
    states = []
    whole = select(documents, 70, **arguments, save=states.append)
    assert len(states) >= 12 and states[-1].selected.tolist() == whole.tolist()
    for state in states[::4]:
        assert select(documents, 70, **arguments, state=State(*map(np.copy, state))).tolist() == whole.tolist()
    assert select(documents, 70, **arguments, num_processes=2).tolist() == whole.tolist()
    assert select(documents, 70, **arguments, state=states[-1]).tolist() == whole.tolist(), "nothing left to do"


@pytest.mark.parametrize("engine", ["zlib_exact", "zstd"])
def test_a_killed_selection_goes_on_to_the_same_result(tmp_path, engine):
    documents = sentences(200)
    (tmp_path / "documents.json").write_text(json.dumps(documents))
    program = """
import json, os, signal, sys, numpy as np
from mindpangu.data.zip_selection import State, select
def save(state):
    np.savez("aside.npz", *state)
    os.replace("aside.npz", "state.npz")
    if first and state.selected.size == 30:
        os.kill(os.getpid(), signal.SIGKILL)
first = not os.path.exists("state.npz")
state = None if first else State(*np.load("state.npz").values())
print(*select(json.load(open("documents.json")), 100, sys.argv[1], 60, 20, 10, state=state, save=save))
"""
    arguments = dict(args=[sys.executable, "-c", program, engine], cwd=tmp_path, capture_output=True, text=True)
    assert subprocess.run(**arguments).returncode == -signal.SIGKILL
    resumed = subprocess.run(**arguments, check=True).stdout
    assert list(map(int, resumed.split())) == select(documents, 100, engine, 60, 20, 10).tolist()


def test_zstd_sees_what_was_selected_long_ago():
    texts = [text.encode() for text in sentences(9000, 2, (100, 500))]
    rng = random.Random(0)
    texts += [bytes(rng.choices(range(256), k=400)), bytes(rng.choices(range(256), k=400))]
    history = [9000, *range(9000)]
    assert sum(map(len, texts)) > 3 << 20
    old, other = _Zstandard(texts).score(history, [9000, 9001])
    assert old < 40 < 380 < other


def test_zstd_selects_what_repeats_least():
    rng = random.Random(0)
    fresh = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz ", k=200)) for _ in range(30)]
    # Copies of one text, fewer than K2, and texts that repeat themselves, among them.
    documents = [*fresh[:10], *[fresh[0]] * 10, *fresh[10:], *["again and " * 20] * 40]
    own = [*range(10), *range(20, 40)]
    picks = select(documents, 30, "zstd", 60, 20, 5)
    assert sorted(0 if documents[pick] == fresh[0] else int(pick) for pick in picks) == own
    assert len(set(picks.tolist())) == 30


def test_zstd_picks_pack_no_better_than_the_exact_ones_at_equal_bytes():
    documents = sentences(600, 5, (10, 80))
    exact, fast = ("\n".join(documents[n] for n in select(documents, 100, engine, 300, 60, 20)).encode()
                   for engine in ("zlib_exact", "zstd"))
    size = min(len(exact), len(fast))
    assert len(lzma.compress(fast[:size])) >= len(lzma.compress(exact[:size]))


@pytest.mark.parametrize("engine", ["zlib_exact", "zstd"])
def test_strata_get_their_share_and_a_selection_of_their_own(engine):
    characters = "机器学习是人工智能的一个分支"
    english, chinese = sentences(60), ["".join(random.Random(n).choices(characters, k=40)) for n in range(31)]
    documents, strata = [], []
    for n in range(91):
        documents.append(english.pop() if n % 3 else chinese.pop())
        strata.append(("en", "maths") if n % 3 else ("zh", "maths"))
    picks = select(documents, 40, engine, 30, 10, 4, strata)
    zh = [n for n in range(91) if not n % 3]
    en = [n for n in range(91) if n % 3]
    # 40 * 60 / 91 = 26.4 and 40 * 31 / 91 = 13.6
    assert [strata[pick][0] for pick in picks] == ["en"] * 26 + ["zh"] * 14
    for which, budget, ours in ((en, 26, picks[:26]), (zh, 14, picks[26:])):
        alone = select([documents[n] for n in which], budget, engine, 30, 10, 4)
        assert [which[n] for n in alone] == ours.tolist()


@pytest.mark.parametrize("engine", ["zlib_exact", "zstd"])
def test_every_document_is_selected_once_whatever_it_is(engine):
    documents = ["", "", "\0" * 1000, "学习", "😀", "\ud83d", "long " * 200_000, *sentences(20), *sentences(20)]
    assert len(documents[6]) == 1_000_000
    assert sorted(select(documents, 1000, engine, 20, 10, 3).tolist()) == list(range(len(documents)))
    assert select(documents, 0, engine).size == select([], 5, engine).size == 0


@pytest.mark.parametrize("arguments, message", [
    ({"engine": "gzip"}, "engine='gzip', compat=None: expected one of zlib_exact, zstd"),
    ({"compat": "repr"}, "compat='repr' with zlib_exact only"),
    ({"k2": 50, "k3": 60}, "k2=50, k3=60, num_processes=1: expected a budget of 0 or more, 1 <= k3 <= k2 <= k1"),
    ({"budget": -1}, "budget=-1"),
    ({"strata_N": ["en"]}, "1 strata for 2 documents: expected a label for each"),
    ({"state": State(np.zeros(3), np.zeros(0, np.int64))}, "the state is of 3 documents, here are 2"),
])
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        select(["a", "b"], **{"budget": 1, **arguments})
