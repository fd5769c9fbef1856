import unicodedata

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mindpangu.data.words import _BATCH_CHARS, fold, hash_ngrams, hash_words

SPACELESS = ("CJK UNIFIED", "CJK COMPATIBILITY", "HIRAGANA", "KATAKANA", "THAI")
# Letters that change under folding, alone or with a neighbour; digits, marks, scripts, emoji, and what separates.
CHARACTERS = ("ab Z9_-.\n\0\u0301\u00e9\u00c5\u00df\u0130\u03a3\u03c3\ufb01\uff21\u00b2\u5b66\u4e60\u3042\u30ab\u0e01"
              "\u1112\u1161\ud55c\u0939\u093f\U0001f600\U0001f44d\U0001f3fd\u200d\ufe0f\u2014\ud83d")
TEXTS = st.text(st.sampled_from(CHARACTERS), max_size=12)


def plain_words(text):
    """The words of a text by the letter of hash_words's promise, from the names and categories of its characters."""
    words, joined = [], False
    for character in unicodedata.normalize("NFKC", text).casefold():
        emoji = character in "\U0001f600\U0001f44d\U0001f3fd"
        if emoji or unicodedata.name(character, "").startswith(SPACELESS):
            words.append(character)
            joined = False
        elif unicodedata.category(character)[0] in "LMN" and character != "\ufe0f":
            words = [*words[:-1], words[-1] + character] if joined else [*words, character]
            joined = True
        else:
            joined = False
    return words


def found_words(documents):
    words = hash_words(documents)
    assert words.hashes_W.dtype == np.uint64 and len(words.starts_D1) == len(documents) + 1
    spans = list(zip(words.begins_W, words.ends_W, strict=True))
    of = [range(*pair) for pair in zip(words.starts_D1[:-1], words.starts_D1[1:], strict=True)]
    return [[fold(document)[slice(*spans[w])] for w in which] for document, which in zip(documents, of, strict=True)]


@settings(deadline=None, max_examples=200)
@given(st.lists(TEXTS, max_size=6))
@example(["", "\0", "a\0b", ""])
@example(["a\u0301", "\u0301a", "\u03a3"])  # a mark at the start of a document belongs to no other document
def test_words_are_those_of_a_plain_loop_over_the_characters(documents):
    expected = [plain_words(document) for document in documents]
    assert found_words(documents) == expected
    hash_of = {}
    for word, value in zip(sum(expected, []), hash_words(documents).hashes_W.tolist(), strict=True):
        assert hash_of.setdefault(word, value) == value
    assert len(set(hash_of.values())) == len(hash_of)


def test_hand_worked_words():
    assert found_words(["Tom’s １２ cafés, x²+1!", "机器学习 AI 😀😀", ""]) == [
        ["tom", "s", "12", "cafés", "x2", "1"], ["机", "器", "学", "习", "ai", "😀", "😀"], []]


def test_hashes_do_not_depend_on_what_a_batch_holds_besides():
    rng = np.random.default_rng(0)
    documents = ["".join(rng.choice(list("abc 12\u5b66"), size)) for size in rng.integers(0, 4000, 60)]
    documents += ["x" * (_BATCH_CHARS + 1), "yes no " * 150_000, "\0" * 1_000_000, "", "last"]
    assert sum(map(len, documents)) > 3 * _BATCH_CHARS
    together = hash_words(documents)
    for d, document in enumerate(documents):
        alone = hash_words([document])
        ours = slice(*together.starts_D1[d : d + 2])
        assert np.array_equal(together.hashes_W[ours], alone.hashes_W)
        assert np.array_equal(together.begins_W[ours], alone.begins_W)
        assert np.array_equal(together.ends_W[ours], alone.ends_W)


def test_hashes_stay_what_stored_ones_were():
    # Recorded: changing them would silently unmake every stored index and key.
    hashes_W = hash_words(["hello \u5b66"]).hashes_W
    assert hashes_W.tolist() == [10748391522335846448, 14772943800113630234]
    assert hash_ngrams(hashes_W, 2).tolist() == [3655899892221252774]


def test_ngrams_hash_alike_if_and_only_if_their_words_do():
    words = np.random.default_rng(1).choice(hash_words(["a b c"]).hashes_W, 200)
    grams = [tuple(words[w : w + 3].tolist()) for w in range(198)]
    hashes = hash_ngrams(words, 3).tolist()
    assert len(set(grams)) == len(set(hashes)) == len(set(zip(grams, hashes, strict=True)))
    assert hash_ngrams(words[:2], 3).size == 0
    with pytest.raises(ValueError, match="n=65: expected an n-gram of 1 to 64 words"):
        hash_ngrams(words, 65)
