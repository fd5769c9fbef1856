import collections
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindpangu.data import dedup
from mindpangu.data.dedup import Shingles, content_key, near_duplicates, shingle, sign

VOCABULARY = [f"word{n}" for n in range(3000)]


def plain_shingles(document, num_words=5):
    """The set of a document whose words are parted by spaces; no Chinese, no case."""
    words = document.split()
    return {tuple(words[w : w + num_words]) for w in range(max(1, len(words) - num_words + 1))} if words else set()


def plain_jaccard(left, right):
    return len(left & right) / len(left | right)


def plain_components(documents, threshold, num_words=5):
    """Component of each document, by all pairs: the index of its first member."""
    sets = [plain_shingles(document, num_words) for document in documents]
    component = list(range(len(documents)))
    for right in range(len(documents)):
        for left in range(right):
            if sets[left] and sets[right] and plain_jaccard(sets[left], sets[right]) >= threshold:
                old, new = component[right], component[left]
                low = min(old, new)
                component = [low if c in (old, new) else c for c in component]
    return component


def edited(words, num_edits, rng):
    words = list(words)
    for w in rng.sample(range(len(words)), num_edits):
        words[w] = rng.choice(VOCABULARY)
    return " ".join(words)


def planted(num_originals, rng, num_words=(20, 120), num_edits=(0, 1, 2, 3, 4)):
    """Originals of random words and a copy of each with each number of words exchanged, in random order."""
    documents = []
    for _ in range(num_originals):
        words = rng.choices(VOCABULARY, k=rng.randint(*num_words))
        documents += [" ".join(words), *(edited(words, edits, rng) for edits in num_edits)]
    rng.shuffle(documents)
    return documents


def test_planted_copies_are_found_as_by_all_pairs():
    documents = planted(60, random.Random(0))
    expected = plain_components(documents, 0.7)
    partners, scores = near_duplicates(documents)
    found = [expected[d] == expected[partner] for d, partner in enumerate(partners.tolist())]
    assert all(found), "no document is dropped for one that all pairs don't link it to"
    num_expected, num_kept = len(set(expected)), int((partners == np.arange(len(documents))).sum())
    assert num_expected < 0.6 * len(documents)
    # Expected misses at 1.5e-4 a pair at the threshold: none of 60 components with several links.
    assert num_kept == num_expected
    sets = list(map(plain_shingles, documents))
    assert scores.tolist() == [plain_jaccard(sets[d], sets[p]) for d, p in enumerate(partners)]


@pytest.mark.parametrize("num_edits, duplicate", [(0, True), (1, True), (2, True), (3, True), (4, False), (20, False)])
def test_the_threshold_at_known_edits(num_edits, duplicate):
    # 100 words, 96 shingles; an exchanged word, far from others, takes 5 away: Jaccard (96 - 5k) / (96 + 5k).
    words = VOCABULARY[:100]
    copy = list(words)
    for k in range(num_edits):
        copy[10 + 4 * k if num_edits == 20 else 10 + 20 * k] = f"other{k}"
    partners, scores = near_duplicates([" ".join(words), " ".join(copy)], num_permutations=512)
    assert partners.tolist() == ([0, 0] if duplicate else [0, 1])
    if duplicate:
        assert scores[1] == (96 - 5 * num_edits) / (96 + 5 * num_edits)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.sampled_from("abc"), max_size=9).map(" ".join), max_size=12),
       st.sampled_from([0.5, 0.7, 1]),
       st.randoms(use_true_random=False))
def test_components_are_those_of_all_pairs_in_any_order(documents, threshold, rng):
    # Bands of a single value, 64 of them: a pair at 0.5 is missed once in 10^19.
    def search(documents, quality=None):
        return near_duplicates(documents, quality, threshold, 64, band_size=1, num_words=2)

    expected = plain_components(documents, threshold, 2)
    assert search(documents).partners_D.tolist() == expected
    quality = rng.sample(range(len(documents)), len(documents))
    partners = search(documents, quality).partners_D.tolist()
    best = {c: max((quality[d], d) for d in range(len(documents)) if expected[d] == c)[1] for c in expected}
    assert partners == [best[c] for c in expected]
    order = rng.sample(range(len(documents)), len(documents))
    again = search([documents[d] for d in order], [quality[d] for d in order]).partners_D
    assert [order[partner] for partner in again] == [partners[d] for d in order]


@pytest.mark.parametrize("num_unique", [16, 20, 24, 40])
def test_many_documents_that_share_a_long_text_are_compared_exactly(num_unique, monkeypatch):
    monkeypatch.setattr(dedup, "_DENSE_RESULTS", 3000)  # several blocks of the products' rows and columns
    monkeypatch.setattr(dedup, "_DENSE_OPERANDS", 5000)
    rng = random.Random(num_unique)
    common = rng.choices(VOCABULARY, k=100)
    # With 16, 20, 24 and 40 own words: Jaccard 0.75, 0.71, 0.66 and 0.55 within, less after an edit.
    documents = [edited(common, rng.randint(0, 1), rng) + " " + " ".join(rng.choices(VOCABULARY, k=num_unique))
                 for _ in range(120)]
    expected = plain_components(documents, 0.7)
    assert near_duplicates(documents).partners_D.tolist() == expected


def test_a_chain_is_one_component_and_its_score_is_to_the_kept_document():
    words = VOCABULARY[:60]
    # Five words more are exchanged in each: 9 of 56 shingles.
    chain = [" ".join(VOCABULARY[100 : 100 + 5 * k] + words[5 * k :]) for k in range(6)]
    partners, scores = near_duplicates(chain, [0, 0, 0, 0, 0, 1], num_permutations=512)
    assert partners.tolist() == [5] * 6
    assert scores[4] == 47 / 65 and scores[3] < 0.7 and scores[0] == 31 / 81


def test_ties_of_quality_keep_the_first():
    documents = ["the same few words here again", "another text of quite other words",
                 "The same few words, here again!"]
    assert near_duplicates(documents).partners_D.tolist() == [0, 1, 0]
    assert near_duplicates(documents, [1, 0, 2]).partners_D.tolist() == [2, 1, 2]


def test_chinese_is_compared_by_characters_and_emoji_count():
    text = "机器学习是人工智能的一个分支，它使计算机能够从数据中学习，而无需进行明确的编程，因此应用十分广泛。"
    smiles = "😀😁😂🤣😃😄"
    documents = [text, text.replace("十分", "非常"), text.replace("，", ", "), text[::-1],
                 smiles, smiles + "!", smiles[::-1]]
    partners, scores = near_duplicates(documents)
    assert partners.tolist() == [0, 0, 0, 3, 4, 4, 6]
    # 45 characters, 41 shingles, of which two exchanged characters before the last two are in 4.
    assert len([c for c in text if c not in "，。"]) == 45 and scores[1] == 37 / 45


def test_empty_long_and_nul_documents():
    rng = random.Random(3)
    long = " ".join(rng.choices(VOCABULARY, k=150_000))
    assert len(long) > 1_000_000
    documents = ["", "!?", long, "\0", long.replace(" ", "\0"), "one", "one.", "\0one\0", "one two", ""]
    partners, scores = near_duplicates(documents)
    assert partners.tolist() == [0, 1, 2, 3, 2, 5, 5, 5, 8, 9]
    assert set(scores.tolist()) == {1.0}
    empty = near_duplicates([])
    assert empty.partners_D.size == empty.scores_D.size == 0


@given(st.lists(st.lists(st.sampled_from("abcd"), max_size=8).map(" ".join), max_size=8), st.integers(1, 6))
@settings(deadline=None)
def test_shingles_are_those_of_a_plain_loop(documents, num_words):
    shingles = shingle(documents, num_words)
    gram_of = collections.defaultdict(set)
    for d, document in enumerate(documents):
        words = document.split()
        plain = [tuple(words[w : w + num_words]) for w in range(max(1, len(words) - num_words + 1))] if words else []
        hashes = shingles.hashes_S[shingles.starts_D1[d] : shingles.starts_D1[d + 1]].tolist()
        for gram, value in zip(plain, hashes, strict=True):
            gram_of[value].add(gram)
    assert all(len(grams) == 1 for grams in gram_of.values())
    assert len(gram_of) == len(set.union(set(), *gram_of.values()))


def test_signatures_agree_as_often_as_the_sets_are_similar():
    rng = np.random.default_rng(0)
    for shared, own in ((300, 20), (100, 100), (20, 300)):
        hashes = rng.integers(0, 2**64, shared + 2 * own, np.uint64)
        both = np.concatenate([hashes[: shared + own], hashes[own:][::-1]])
        agree = np.equal(*sign(Shingles(both, np.array([0, shared + own, both.size])), 4096).T).mean()
        jaccard = shared / (shared + 2 * own)
        assert agree == pytest.approx(jaccard, abs=4 * (jaccard * (1 - jaccard) / 4096) ** 0.5)


def test_a_signature_is_the_least_of_its_parts_however_long():
    hashes = np.random.default_rng(0).integers(0, 2**64, 5000, np.uint64)
    cuts = np.array([0, 1, 256, 513, 513, 1300, 5000])
    parts = sign(Shingles(hashes, cuts), 16)
    assert (parts[:, 3] == 2**32 - 1).all(), "no shingles"
    assert np.array_equal(sign(Shingles(hashes, np.array([0, 5000])), 16)[:, 0], parts.min(1))
    singles = sign(Shingles(hashes, np.arange(5001)), 16)
    assert np.array_equal(parts[:, 4], singles[:, 513:1300].min(1))


def test_equal_texts_are_those_that_differ_in_case_spaces_and_compatibility_forms_only():
    texts = ["A  cat\n", "a cat", "a\u00a0CAT", "\uff41 cat", "a, cat", "acat", "", " \n", "\0",
             "caf\u00e9", "cafe\u0301", "\ud83d", "机器", "机 器"]
    keys = [content_key(text) for text in texts]
    assert [keys.index(key) for key in keys] == [0, 0, 0, 0, 4, 5, 6, 6, 8, 9, 9, 11, 12, 13]
    assert len({content_key(text) for text in texts}) == 9 and all(len(content_key(text)) == 16 for text in texts)


@pytest.mark.parametrize("arguments, message", [
    ({"threshold": 0}, "threshold=0: expected a Jaccard similarity above 0"),
    ({"num_permutations": 10}, "num_permutations=10: expected a multiple of band_size=4"),
    ({"quality_D": [1]}, r"quality_D of shape \(1,\): expected a finite number for each of the 2 documents"),
    ({"quality_D": [1, float("nan")]}, "expected a finite number for each"),
    ({"num_words": 0}, "n=0: expected an n-gram of 1 to 64 words"),
])
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        near_duplicates(["a", "b"], **arguments)


@pytest.mark.parametrize("num_bits", [1, 8, 23])
def test_documents_that_share_a_key_are_found_however_little_is_counted(monkeypatch, num_bits):
    monkeypatch.setattr(dedup, "_MAX_COUNTED_BITS", num_bits)
    rng = np.random.default_rng(0)
    keys_D = rng.integers(0, 2**64, 2000, np.uint64)[rng.integers(0, 2000, 3000)]
    members, starts = dedup.equal_keys(keys_D)
    documents_of = collections.defaultdict(list)
    for document, key in enumerate(keys_D.tolist()):
        documents_of[key].append(document)
    shared = sorted(documents for documents in documents_of.values() if len(documents) > 1)
    assert sorted(run.tolist() for run in np.split(members, starts[1:])) == shared
