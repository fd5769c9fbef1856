"""Which documents hold items of benchmarks: shared word 13-grams, short items whole."""

# D documents, W words of a batch of documents, G distinct n-grams of the items, Q matches
import bisect
from typing import NamedTuple

import numpy as np

from mindpangu.data.words import batches, fold, hash_ngrams, hash_words, normalise, ranges

NGRAM_WORDS = 13
CONTAINED_WORDS = 8  # items of at least so many, but fewer than 13, words are looked for whole; shorter ones: equality
# Characters of documents looked at at a time: what bounds the memory.
_BATCH_CHARS = 1 << 20
_CHUNK_PAIRS = 1 << 20  # of an n-gram's place in a document and an item that has it


class Item(NamedTuple):
    """One item of a benchmark. name: what finds it again, such as an id. text: what is not to be trained on."""

    benchmark: str
    name: str
    text: str


class Hit(NamedTuple):
    """A document, by its number, holds an item; its characters from start to end are the longest stretch they share."""

    document: int
    benchmark: str
    item: str
    start: int
    end: int


class _Grams(NamedTuple):
    """n-grams of one length, sorted: g is in the counts_G[g] items that Index.holders has from begins_G[g] on."""

    hashes_G: np.ndarray  # uint64
    begins_G: np.ndarray  # int64
    counts_G: np.ndarray  # int64


class Index(NamedTuple):
    """Benchmark items, ready for `find_items`."""

    items: list  # of Item
    grams: dict  # n -> _Grams, n from CONTAINED_WORDS to NGRAM_WORDS
    holders: np.ndarray  # int64, indices of the items that hold an n-gram, for all n-grams
    openings: np.ndarray  # bool: whether an n-gram may begin with eight words whose hash has these upper bits
    texts: dict  # normalised text of an item of fewer than CONTAINED_WORDS words -> indices of such items


def index_items(items):
    """The Index of a list of Item.

    Raises ValueError for an item without text: it would be equal to every empty document.
    """
    words = hash_words([item.text for item in items])
    counts = np.diff(words.starts_D1)
    texts = {}
    for i in np.flatnonzero(counts < CONTAINED_WORDS).tolist():
        text = normalise(items[i].text)
        if not text:
            raise ValueError(f"benchmark {items[i].benchmark}, item {items[i].name}: no text. Leave the item out, or "
                             "name the field that holds its question.")
        texts.setdefault(text, []).append(i)
    grams, holders, openings = {}, [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
    for n in range(CONTAINED_WORDS, NGRAM_WORDS + 1):
        ours = np.flatnonzero(counts >= n if n == NGRAM_WORDS else counts == n)
        num_grams = counts[ours] - n + 1
        starts = ranges(words.starts_D1[ours], num_grams)
        hashes, holder = hash_ngrams(words.hashes_W, n, starts), np.repeat(ours, num_grams)
        order = np.lexsort((holder, hashes))
        hashes, holder = hashes[order], holder[order]
        repeated = (hashes[1:] == hashes[:-1]) & (holder[1:] == holder[:-1])  # in one item
        hashes, holder = (values[np.append(True, ~repeated)[: starts.size]] for values in (hashes, holder))
        if starts.size:
            distinct_G, begins_G, counts_G = np.unique(hashes, return_index=True, return_counts=True)
            grams[n] = _Grams(distinct_G, begins_G + sum(map(len, holders)), counts_G)
        holders.append(holder)
        openings.append(hash_ngrams(words.hashes_W, CONTAINED_WORDS, starts))
    openings = np.concatenate(openings)
    num_bits = max(8, (16 * openings.size).bit_length())
    slots = np.zeros(1 << num_bits, bool)
    slots[_upper(openings, num_bits)] = True
    return Index(list(items), grams, np.concatenate(holders), slots, texts)


def find_items(documents, index):
    """Hits in a list of strings, by document, then item; at most one for each document and item.

    An item of 13 or more words is found by any 13 of them in a row, one of 8 to 12 by all of them in a row, and a
    shorter one only by a document of the same text after `normalise`. Words are those of `hash_words`: case,
    punctuation and white space make no difference, and Chinese counts by character. Equal hashes of 64 bits stand for
    equal words. Source: Brown et al. 2020, arXiv:2005.14165, appendix C (13-grams).
    """
    hits, num_before = [], 0
    for batch in batches(documents, _BATCH_CHARS):
        words = hash_words(batch)
        for d, i, first, end in _shared_stretches(words, index):
            document, item = batch[d], index.items[i]
            span = _unfolded(document, int(words.begins_W[first]), int(words.ends_W[end - 1]))
            hits.append((num_before + d, i, Hit(num_before + d, item.benchmark, item.name, *span)))
        for d in np.flatnonzero(np.diff(words.starts_D1) < CONTAINED_WORDS).tolist() if index.texts else ():
            for i in index.texts.get(normalise(batch[d]), ()):
                item = index.items[i]
                hits.append((num_before + d, i, Hit(num_before + d, item.benchmark, item.name, 0, len(batch[d]))))
        num_before += len(batch)
    return [hit for _, _, hit in sorted(hits)]


def _shared_stretches(words, index):
    """Yields (document, item, first word, end word): the longest stretch that a pair shares, of equals the first."""
    # Every n-gram begins with eight words: looking these up once rules out nearly every place for all n.
    num_bits = index.openings.size.bit_length() - 1
    openings_W = hash_ngrams(words.hashes_W, CONTAINED_WORDS)
    places = np.flatnonzero(index.openings[_upper(openings_W, num_bits)])
    documents = np.searchsorted(words.starts_D1, places, side="right") - 1
    room = words.starts_D1[documents + 1] - places
    matches = [np.zeros((5, 0), np.int64)]
    for n, grams in index.grams.items():
        starts = places[room >= n]
        hashes = hash_ngrams(words.hashes_W, n, starts)
        which = np.minimum(np.searchsorted(grams.hashes_G, hashes), grams.hashes_G.size - 1)
        equal = grams.hashes_G[which] == hashes
        which = which[equal]
        matches.append(np.stack([documents[room >= n][equal], starts[equal], np.full(which.size, n),
                                 grams.begins_G[which], grams.counts_G[which]]))
    matches = np.concatenate(matches, axis=1)
    matches = matches[:, np.argsort(matches[0], kind="stable")]
    # A phrase that hundreds of items begin with counts once for each: some documents at a time.
    num_pairs = np.cumsum(matches[4])
    chunk_of_D = np.zeros(words.starts_D1.size, np.int64)
    chunk_of_D[matches[0]] = num_pairs // _CHUNK_PAIRS
    ends = np.searchsorted(chunk_of_D[matches[0]], np.unique(chunk_of_D[matches[0]]), side="right")
    for begin, end in zip(np.append(0, ends)[:-1], ends, strict=True):
        yield from _longest(*matches[:, begin:end], index.holders)


def _longest(documents, starts, n, begins, counts, holders):
    items_Q = holders[ranges(begins, counts)]
    documents_Q, starts_Q, n_Q = (np.repeat(values, counts) for values in (documents, starts, n))
    order = np.lexsort((starts_Q, items_Q, documents_Q))
    documents_Q, items_Q, starts_Q, n_Q = documents_Q[order], items_Q[order], starts_Q[order], n_Q[order]
    same_pair = (documents_Q[1:] == documents_Q[:-1]) & (items_Q[1:] == items_Q[:-1])
    firsts = np.flatnonzero(np.append(True, ~same_pair | (starts_Q[1:] != starts_Q[:-1] + 1)))
    lasts = np.append(firsts[1:], starts_Q.size) - 1
    stretches = np.stack([documents_Q[firsts], items_Q[firsts], starts_Q[firsts], starts_Q[lasts] + n_Q[lasts]], 1)
    stretches = stretches[np.lexsort((stretches[:, 2], stretches[:, 2] - stretches[:, 3], *stretches[:, 1::-1].T))]
    return stretches[np.append(True, (stretches[1:, :2] != stretches[:-1, :2]).any(1))].tolist()


def _upper(hashes, num_bits):
    return (hashes >> np.uint64(64 - num_bits)).astype(np.int64)


def _unfolded(document, begin, end):
    """The characters of document that those from begin to end of fold(document) come from."""
    if document.isascii():
        return begin, end

    def folded_length(length):
        return len(fold(document[:length]))

    lengths = range(len(document) + 1)
    start = bisect.bisect_right(lengths, begin, key=folded_length) - 1
    # As many as it takes, and marks that compose with the last of them.
    return start, max(bisect.bisect_left(lengths, end, key=folded_length),
                      bisect.bisect_right(lengths, end, key=folded_length) - 1)
