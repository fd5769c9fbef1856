"""Words of documents as 64-bit hashes: what near-duplicates and contamination are found by."""

# D documents, W words of all documents, C characters of a batch
import functools
import unicodedata
from typing import NamedTuple

import numpy as np

# Characters hashed at a time: the temporary arrays of a batch, 8 bytes a character, stay in a core's cache.
_BATCH_CHARS = 1 << 16
_SEPARATE, _JOIN, _ALONE = 0, 1, 2  # what a character does: part words, extend its word, be a word
# Scripts that put no spaces between words, and emoji.
_ALONE_RANGES = ((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x2600, 0x27BF), (0x3005, 0x3007),
                 (0x3040, 0x312F), (0x31A0, 0x31BF), (0x31F0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF),
                 (0xF900, 0xFAFF), (0x1F000, 0x1FAFF), (0x20000, 0x3FFFF))
_VARIATION_SELECTORS = (0xFE00, 0xFE0F)  # marks that only ask for another picture of an emoji
# Bits of a generator whose output NumPy promises to keep, so that hashes can be stored.
_MULTIPLIERS = np.random.PCG64(20240706).random_raw(65) | np.uint64(1)


class Words(NamedTuple):
    """Words of D documents. Document d has those of starts_D1[d] to starts_D1[d + 1]."""

    hashes_W: np.ndarray  # uint64
    begins_W: np.ndarray  # int64, characters from the start of the document, after `fold`
    ends_W: np.ndarray
    starts_D1: np.ndarray  # int64


def fold(text):
    """text without the differences that make no other word: Unicode's compatibility forms (NFKC), and case."""
    return text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()


def normalise(text):
    """text after `fold`, with every run of white space as one space and none at its ends."""
    return " ".join(fold(text).split())


def hash_words(documents):
    """The Words of a list of strings.

    A word is a run of letters, marks and digits. A character of a script without spaces (Chinese, Japanese, Thai, ...)
    and an emoji are each a word. All else separates. Equal words, after `fold`, have equal hashes; different words
    have different ones but for 1 in 2^64 pairs, for text that was not made to defeat it.
    """
    hashes, begins, ends, counts = [], [], [], []
    for batch in batches(documents, _BATCH_CHARS):
        joined = "\0".join(map(fold, batch))
        if joined.count("\0") >= len(batch):  # only then does a document hold the mark that goes between two
            joined = "\0".join(fold(document).replace("\0", " ") for document in batch)
        if joined.isascii():
            codes_C = np.frombuffer(joined.encode("ascii"), np.uint8)
        else:
            codes_C = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32)
        kinds_C = np.zeros(codes_C.size + 2, np.uint8)
        np.take(_kinds(), codes_C, out=kinds_C[1:-1], mode="clip")  # "raise" would buffer; no code is out of range
        same_word_C = (kinds_C[1:] == _JOIN) & (kinds_C[:-1] == _JOIN)
        in_word_C = kinds_C != _SEPARATE
        begins_W = np.flatnonzero(in_word_C[1:] & ~same_word_C)
        ends_W = np.flatnonzero(in_word_C[:-1] & ~same_word_C)

        # Polynomial of the characters modulo 2^64: a difference of two partial sums, brought to the power zero.
        powers_C, inverses_C = _powers(codes_C.size.bit_length())
        sums_C = np.zeros(codes_C.size + 1, np.uint64)
        np.cumsum(np.multiply(codes_C, powers_C[:codes_C.size]), out=sums_C[1:])
        hashes.append(_mix((sums_C[ends_W] - sums_C[begins_W]) * inverses_C[begins_W]))

        document_starts_D = np.append(0, np.flatnonzero(codes_C == 0) + 1)
        first_words_D1 = np.append(np.searchsorted(begins_W, document_starts_D), begins_W.size)
        counts.append(np.diff(first_words_D1))
        offsets_W = np.repeat(document_starts_D, counts[-1])
        begins.append(begins_W - offsets_W)
        ends.append(ends_W - offsets_W)
    starts_D1 = np.zeros(len(documents) + 1, np.int64)
    if not documents:
        return Words(np.zeros(0, np.uint64), np.zeros(0, np.int64), np.zeros(0, np.int64), starts_D1)
    np.cumsum(np.concatenate(counts), out=starts_D1[1:])
    return Words(np.concatenate(hashes), np.concatenate(begins), np.concatenate(ends), starts_D1)


def hash_ngrams(hashes_W, n, starts=None):
    """uint64, one hash for the n words that start at each of starts; None: at each word that has n - 1 behind it.

    A word hash of 0 stands for no word: fewer than n words followed by zeros hash like themselves.
    Raises ValueError if n is not 1 to 64.
    """
    if not 1 <= n < _MULTIPLIERS.size:
        raise ValueError(f"n={n}: expected an n-gram of 1 to {_MULTIPLIERS.size - 1} words.")
    size = max(hashes_W.size - n + 1, 0) if starts is None else starts.size
    sums = np.zeros(size, np.uint64)
    for k in range(n):
        sums += (hashes_W[k : k + size] if starts is None else hashes_W[starts + k]) * _MULTIPLIERS[k]
    return sums


def batches(documents, num_chars):
    """Yields lists of successive documents, each of about num_chars characters or one longer document."""
    ends_D = np.cumsum([len(document) for document in documents])
    cuts = np.flatnonzero(np.diff(ends_D // num_chars)) + 1
    for first, end in zip([0, *cuts], [*cuts, len(documents)], strict=True):
        if first < end:
            yield documents[first:end]


def ranges(starts, counts):
    """int64 [sum of counts]: start, start + 1, ... for each (start, count), one after the other."""
    counts = np.asarray(counts, np.int64)
    ends = np.cumsum(counts)
    return np.arange(counts.sum()) + np.repeat(starts - (ends - counts), counts)


@functools.cache
def _kinds():
    """uint8 for every code point: what it does."""
    kinds = np.zeros(0x110000, np.uint8)
    # No letter of a script with spaces lies above the second plane.
    categories = "".join(unicodedata.category(chr(code))[0] for code in range(0x20000)).encode()
    kinds[: len(categories)] = np.isin(np.frombuffer(categories, np.uint8), np.frombuffer(b"LMN", np.uint8)) * _JOIN
    for first, last in _ALONE_RANGES:
        kinds[first : last + 1] = _ALONE
    kinds[_VARIATION_SELECTORS[0] : _VARIATION_SELECTORS[1] + 1] = _SEPARATE
    return kinds


@functools.cache
def _powers(num_bits):
    """Powers 0 to 2^num_bits - 1 of an odd number modulo 2^64, and their inverses."""
    base = int(_MULTIPLIERS[-1])
    factors = [np.full(1 << num_bits, factor, np.uint64) for factor in (base, pow(base, -1, 1 << 64))]
    for factor in factors:
        factor[0] = 1
    return [np.multiply.accumulate(factor) for factor in factors]


def _mix(hashes_W):
    """MurmurHash3's finalizer, in place: every bit of the result depends on every bit of the hash."""
    for shift, multiplier in ((33, 0xFF51AFD7ED558CCD), (33, 0xC4CEB9FE1A85EC53)):
        hashes_W ^= hashes_W >> np.uint64(shift)
        hashes_W *= np.uint64(multiplier)
    hashes_W ^= hashes_W >> np.uint64(33)
    return hashes_W
