import random
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindpangu.data import decontaminate
from mindpangu.data.decontaminate import Hit, Item, find_items, index_items

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def words_of(text):
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()


def plain_stretches(document, item):
    """All (number of words, first word) of what a document shares with an item, by the rule's letter; ASCII."""
    ours, theirs = words_of(document), words_of(item)
    if len(theirs) < 8:
        equal = " ".join(document.lower().split()) == " ".join(item.lower().split())
        return {(len(ours), 0)} if equal else set()
    n = min(13, len(theirs))
    grams = {tuple(theirs[w : w + n]) for w in range(len(theirs) - n + 1)}
    starts = [w for w in range(len(ours) - n + 1) if tuple(ours[w : w + n]) in grams]
    stretches = set()
    for start in starts:
        if start - 1 not in starts:
            end = start
            while end + 1 in starts:
                end += 1
            stretches.add((end - start + n, start))
    return stretches


def texts(max_size):
    return st.lists(st.sampled_from("ab"), max_size=max_size).map(" ".join)


@settings(deadline=None, max_examples=300)
@given(st.lists(texts(24), max_size=6), st.lists(texts(18).filter(bool), max_size=5))
def test_hits_are_those_of_a_plain_loop(documents, items):
    # Two letters only: 13-grams, whole items, repeats in one item and items that share n-grams all occur.
    hits = find_items(documents, index_items([Item("b", str(i), text) for i, text in enumerate(items)]))
    expected = {(d, str(i)): plain_stretches(document, item) for d, document in enumerate(documents)
                for i, item in enumerate(items)}
    assert [(hit.document, hit.item) for hit in hits] == sorted(pair for pair in expected if expected[pair])
    for hit in hits:
        num_words, first = min(expected[hit.document, hit.item], key=lambda stretch: (-stretch[0], stretch[1]))
        if num_words:
            document = documents[hit.document]
            assert words_of(document[: hit.start]) == words_of(document)[:first]
            assert words_of(document[hit.start : hit.end]) == words_of(document)[first : first + num_words]


@pytest.mark.parametrize("num_words", [8, 9, 12, 13, 14, 40])
def test_every_planted_item_of_8_or_more_words_is_found_where_it_is(num_words):
    rng = random.Random(num_words)
    vocabulary = [a + b for a in LETTERS for b in LETTERS]
    items = [Item("bench", f"#{i}", " ".join(rng.choices(vocabulary, k=num_words))) for i in range(50)]
    documents, spans = [], []
    for item in items:
        before, after = (" ".join(rng.choices(vocabulary, k=rng.randint(0, 30))) + rng.choice(["", " ", ". ", "\n"])
                         for _ in range(2))
        before, after = before and before + "! ", after and " (" + after
        planted = rng.choice([item.text, item.text.upper(), item.text.replace(" ", ",  "), item.text.title() + "?"])
        documents.append(before + planted + after)
        spans.append((len(before), len(before) + len(planted.rstrip("?"))))
    hits = find_items(documents, index_items(items))
    assert hits == [Hit(d, "bench", f"#{d}", *spans[d]) for d in range(50)]


def test_what_lacks_a_word_or_has_another_is_no_hit():
    words = [f"w{n}" for n in range(20)]
    index = index_items([Item("long", "1", " ".join(words)), Item("short", "2", " ".join(words[:9])),
                         Item("tiny", "3", "What is 2+2?")])
    assert find_items([" ".join(words[4:16])], index) == [], "12 words of the long one"
    assert [hit.benchmark for hit in find_items([" ".join(words[4:17])], index)] == ["long"]
    assert find_items([" ".join(words[:8]), " ".join(words[1:9])], index) == [], "8 of 9 words"
    assert find_items([" ".join(words[:10] + ["x"] + words[10:16])], index)[0].benchmark == "short"
    assert find_items(["What is 2-2?", "So what is 2+2?"], index) == []
    assert find_items(["x", " what  IS 2+2? "], index) == [Hit(1, "tiny", "3", 0, 15)]
    # The words of one document never go on in the next.
    assert find_items([" ".join(words[:9]), " ".join(words[9:])], index)[0].benchmark == "short"
    assert len(find_items([" ".join(words[:8]), " ".join(words[8:])], index)) == 0


def test_spans_are_characters_of_the_document_as_given():
    item = "小明有三个苹果，妈妈又给了他五个苹果，请问现在小明一共有多少个苹果？"
    index = index_items([Item("cmath", "7", item)])
    document = "题目（例）：１. ﬁrst cafe\u0301 " + item + " 答案：8"
    (hit,) = find_items([document], index)
    assert document[hit.start : hit.end] == item.rstrip("？")
    # 13 of its characters in a row, between emoji.
    part = [c for c in item if c not in "，？"][5:18]
    (hit,) = find_items(["😀" + "".join(part) + "😀"], index)
    assert (hit.start, hit.end) == (1, 14)
    accents = "un deux trois quatre cinq six sept huit e\u0301te\u0301"
    composed = unicodedata.normalize("NFC", accents)
    for form, other in ((accents, composed), (composed, accents)):
        (hit,) = find_items(["½ " + form + "\u2026"], index_items([Item("fr", "1", other)]))
        assert ("½ " + form + "\u2026")[hit.start : hit.end] == form


@pytest.mark.parametrize("chunk", [1, 100, 1 << 20])
def test_items_that_share_words_are_all_reported(chunk, monkeypatch):
    monkeypatch.setattr(decontaminate, "_CHUNK_PAIRS", chunk)
    common = "Sort the following words alphabetically and write them as a list in one line"
    index = index_items([Item("sort", str(i), f"{common}: {word}") for i, word in enumerate(["oak", "elm", "fir"])])
    documents = [f"{common}: elm", "none", f"{common}: elm", f"{common}: elm"]
    expected = [(d, *hit) for d in (0, 2, 3) for hit in (("0", 76), ("1", 81), ("2", 76))]
    assert [(hit.document, hit.item, hit.end) for hit in find_items(documents, index)] == expected
    assert len(common) == 76


def test_empty_long_and_nul_documents(monkeypatch):
    monkeypatch.setattr(decontaminate, "_BATCH_CHARS", 5000)
    words = [f"w{n}" for n in range(20)]
    index = index_items([Item("b", "1", " ".join(words)), Item("b", "2", "\0!")])
    assert find_items([], index) == [] and find_items(["", "\0"], index) == []
    long = "filler " * 150_000
    documents = [long, "", long + " ".join(words) + "\0" + long, "\0".join(words), "\0!", *["short one"] * 3000, "w0"]
    hits = find_items(documents, index)
    assert [(hit.document, hit.item) for hit in hits] == [(2, "1"), (3, "1"), (4, "2")]
    assert (hits[0].start, hits[0].end) == (len(long), len(long) + len(" ".join(words)))
    assert find_items(documents, index_items([])) == []


def test_an_item_without_text_is_refused():
    with pytest.raises(ValueError, match="benchmark b, item 9: no text. Leave the item out"):
        index_items([Item("b", "8", "?"), Item("b", "9", " \n")])
