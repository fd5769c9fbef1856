"""Duplicates: the key that equal texts share, and near-duplicates by MinHash-LSH with exact verification."""

# D documents, S shingles of all documents, P permutations, B bands, R permutations per band, K candidates, Q pairs
from typing import NamedTuple

import numpy as np
import xxhash

from mindpangu.data.words import hash_ngrams, hash_words, normalise, ranges

# A document's shingles are signed in pieces, so that the array of a group of pieces always has long rows.
_PIECE_SHINGLES = 256
_GROUP_SHINGLES = 1 << 15  # 128 KiB of 32-bit hashes and as much of products: what a core's own cache holds
_LONG_RUN = 32  # members of a run
# Elements of a matrix of pairs, and of one of members by shingles.
_DENSE_RESULTS, _DENSE_OPERANDS = 1 << 22, 1 << 24
_CHUNK_LOOKUPS, _CHUNK_PAIRS = 1 << 20, 1 << 12
_LOW_BITS = np.uint64(32)
_MAX_COUNTED_BITS = 23  # 64 MiB of counts


class Shingles(NamedTuple):
    """n-grams of words, as 64-bit hashes. Document d has those of starts_D1[d] to starts_D1[d + 1], with repeats."""

    hashes_S: np.ndarray  # uint64
    starts_D1: np.ndarray  # int64


class Duplicates(NamedTuple):
    """partners_D: int64, what stands for each document, itself if it is kept. scores_D: similarity to that, 0 to 1."""

    partners_D: np.ndarray
    scores_D: np.ndarray


def content_key(text):
    """16 bytes that texts share if they differ in case, white space or Unicode's compatibility forms (NFKC) only.

    Texts that differ otherwise share them for 1 in 2^128 pairs.
    """
    return xxhash.xxh3_128_digest(normalise(text).encode("utf-8", "surrogatepass"))


def near_duplicates(documents, quality_D=None, threshold=0.7, num_permutations=128, band_size=4, num_words=5, seed=0):
    """Duplicates of a list of strings: one document is kept of each component of near-duplicates, the best.

    Two documents are near-duplicates if their sets of shingles have a Jaccard similarity of at least threshold: see
    `shingle`. Candidates share a band of band_size of num_permutations MinHash values; each is verified by its sets, so
    no pair is linked that is not similar. Of those at similarity s a share (1 - s^R)^(P/R) is not seen: 1.5e-4 at 0.7
    with the values here. Of the candidates those are compared whose values agree often enough, which leaves out 5e-5
    more of them. Components: a document may be dropped for one that it is only linked to through others; its
    score, the Jaccard similarity to its partner, is then below the threshold.
    quality_D: the largest is kept, of equals the first; None: the first. Neither the components nor, with distinct
    qualities, who is kept depend on the order of the documents. Documents without words are kept.
    Raises ValueError if quality_D is not a finite number per document, threshold is not in (0, 1], or num_permutations
    is no multiple of band_size. Source: Broder 1997, On the resemblance and containment of documents.
    """
    num_documents = len(documents)
    quality_D = np.zeros(num_documents) if quality_D is None else np.asarray(quality_D, np.float64)
    if quality_D.shape != (num_documents,) or not np.isfinite(quality_D).all():
        raise ValueError(f"quality_D of shape {quality_D.shape}: expected a finite number for each of the "
                         f"{num_documents} documents.")
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold}: expected a Jaccard similarity above 0, at most 1.")
    if band_size < 1 or num_permutations < band_size or num_permutations % band_size:
        raise ValueError(f"num_permutations={num_permutations}: expected a multiple of band_size={band_size}.")
    shingles = shingle(documents, num_words)
    signatures_PD = sign(shingles, num_permutations, seed)
    bands = list(shared_bands(signatures_PD, band_size))
    candidates_K = np.unique(np.concatenate([members for members, _ in bands]))
    sets = _sets(shingles, candidates_K, signatures_PD)
    compare = _Comparison(sets, threshold)

    components_K = np.arange(candidates_K.size)  # the least member of each one's component
    for members, starts in bands:
        members = np.searchsorted(candidates_K, members)
        sizes = np.diff(np.append(starts, members.size))
        # Most runs are one component once each member has met the first: only those that are not meet each other.
        for pairs in (_pairs_with_first, _pairs):
            components = components_K[members]
            mixed = np.minimum.reduceat(components, starts) != np.maximum.reduceat(components, starts)
            members, sizes = members[np.repeat(mixed, sizes)], sizes[mixed]
            starts = np.cumsum(sizes) - sizes
            for left_Q, right_Q in pairs(compare, members, starts, sizes):
                components_K = join(components_K, left_Q, right_Q)

    partners_D, scores_D = np.arange(num_documents), np.ones(num_documents)
    best_first = np.lexsort((candidates_K, -quality_D[candidates_K], components_K))
    _, firsts, which = np.unique(components_K[best_first], return_index=True, return_inverse=True)
    kept_K = np.empty_like(best_first)
    kept_K[best_first] = best_first[firsts][which]
    dropped = np.flatnonzero(kept_K != np.arange(candidates_K.size))
    partners_D[candidates_K[dropped]] = candidates_K[kept_K[dropped]]
    scores_D[candidates_K[dropped]] = _jaccard(sets, dropped, kept_K[dropped])
    return Duplicates(partners_D, scores_D)


def shingle(documents, num_words=5):
    """The Shingles of a list of strings: num_words words in a row, as `hash_words` counts words (Chinese: characters).

    A document of fewer words is one shingle, one without words has none.
    """
    words = hash_words(documents)
    counts_D = np.diff(words.starts_D1)
    # Shorter documents are filled up with the hash of no word.
    padded_counts_D = np.where(counts_D == 0, 0, np.maximum(counts_D, num_words))
    padded_starts_D = np.cumsum(padded_counts_D) - padded_counts_D
    padded = np.zeros(padded_counts_D.sum(), np.uint64)
    padded[ranges(padded_starts_D, counts_D)] = words.hashes_W
    num_shingles_D = np.maximum(padded_counts_D - num_words + 1, 0)
    hashes_S = hash_ngrams(padded, num_words)[ranges(padded_starts_D, num_shingles_D)]
    return Shingles(hashes_S, np.append(0, np.cumsum(num_shingles_D)))


def sign(shingles, num_permutations=128, seed=0):
    """MinHash values uint32 [P, D] of Shingles; those of a document without any are 2^32 - 1.

    A permutation is h -> a h + b modulo 2^32 with odd a, of the upper half of the shingle's hash.
    """
    hashes_S = (shingles.hashes_S >> _LOW_BITS).astype(np.uint32)
    counts_D = np.diff(shingles.starts_D1)
    pieces_D = -(-counts_D // _PIECE_SHINGLES)
    first_pieces_D = np.cumsum(pieces_D) - pieces_D
    piece_starts = np.repeat(shingles.starts_D1[:-1], pieces_D) + _PIECE_SHINGLES * ranges(0 * pieces_D, pieces_D)
    sizes = np.minimum(np.repeat(shingles.starts_D1[1:], pieces_D) - piece_starts, _PIECE_SHINGLES).astype(np.int16)
    by_size = np.argsort(sizes, kind="stable")
    random = np.random.PCG64(seed).random_raw(2 * num_permutations).astype(np.uint32)
    factors_P, summands_P = random[:num_permutations] | np.uint32(1), random[num_permutations:]

    values = np.empty((num_permutations, sizes.size), np.uint32)  # pieces in order of size
    begin = 0
    while begin < sizes.size:
        end = begin + max(1, _GROUP_SHINGLES // int(sizes[by_size[min(begin + 63, sizes.size - 1)]]))
        group = by_size[begin:end]
        # A column is a piece; what a shorter one lacks is filled up with its last shingle, which changes no minimum.
        rows = np.minimum(np.arange(sizes[group[-1]])[:, None], sizes[group] - 1)
        hashes = hashes_S[piece_starts[group] + rows]
        products = np.empty_like(hashes)
        for p in range(num_permutations):
            np.multiply(hashes, factors_P[p], out=products)
            products += summands_P[p]
            np.minimum.reduce(products, axis=0, out=values[p, begin:end])
        begin = end

    rank = np.empty_like(by_size)
    rank[by_size] = np.arange(by_size.size)
    signatures_PD = np.full((num_permutations, counts_D.size), np.iinfo(np.uint32).max, np.uint32)
    whole, parted = np.flatnonzero(pieces_D == 1), np.flatnonzero(pieces_D > 1)
    signatures_PD[:, whole] = values[:, rank[first_pieces_D[whole]]]
    if parted.size:
        columns = rank[ranges(first_pieces_D[parted], pieces_D[parted])]
        firsts = np.cumsum(pieces_D[parted]) - pieces_D[parted]
        signatures_PD[:, parted] = np.minimum.reduceat(values[:, columns], firsts, axis=1)
    return signatures_PD


def shared_bands(signatures_PD, band_size):
    """For each band of band_size MinHash values, the documents that share it with another.

    Yields (members int64, starts int64): members[starts[r]:starts[r + 1]], the last run up to the end, share the band r
    and are in ascending order. Other documents share it by chance for 1 in 2^64 pairs. Documents without shingles
    have no band.
    """
    signed_D = signed(signatures_PD)
    for keys_D in band_keys(signatures_PD, band_size):
        members, starts = equal_keys(keys_D[signed_D])
        yield signed_D[members], starts


def signed(signatures_PD):
    """int64: the documents that have shingles."""
    return np.flatnonzero((signatures_PD != np.iinfo(np.uint32).max).any(0))


def band_keys(signatures_PD, band_size):
    """Yields uint64 [D] for each band: a hash of band_size MinHash values."""
    factors_R = np.random.PCG64(0).random_raw(band_size) | np.uint64(1)
    for first in range(0, len(signatures_PD), band_size):
        keys_D = np.zeros(signatures_PD.shape[1], np.uint64)
        for row, factor in zip(signatures_PD[first : first + band_size], factors_R, strict=True):
            keys_D += row * factor
        yield keys_D


def equal_keys(keys_D):
    """(members, starts) as `shared_bands` yields, of the documents whose key another one has."""
    # Counting the upper bits finds most that are alone at a tenth of what sorting all keys takes.
    num_bits = min(max(8, (16 * keys_D.size).bit_length()), _MAX_COUNTED_BITS)
    slots = (keys_D >> np.uint64(64 - num_bits)).astype(np.int64)
    crowded = np.flatnonzero(np.bincount(slots, minlength=1 << num_bits)[slots] > 1)
    crowded = crowded[np.argsort(keys_D[crowded], kind="stable")]
    same = keys_D[crowded[1:]] == keys_D[crowded[:-1]]
    together = np.append(same, False) | np.append(False, same) if crowded.size else np.zeros(0, bool)
    begins = np.append(True, ~same)[together] if crowded.size else np.zeros(0, bool)
    return crowded[together], np.flatnonzero(begins)


def link_runs(components_D, members, starts):
    """components_D, the least member of each document's component, with each run of members made one component."""
    sizes = np.diff(np.append(starts, members.size))
    return join(components_D, np.repeat(members[starts], sizes - 1), members[ranges(starts + 1, sizes - 1)])


class _Sets(NamedTuple):
    """Sets of shingles of K documents: sorted keys uint64, a document's number above so many bits of a shingle's hash;
    those of document k from starts_K1[k] on. With 2^20 documents 44 bits are left: two shingles share them for 1 in
    2^44 pairs."""

    keys: np.ndarray
    starts_K1: np.ndarray
    num_bits: np.uint64
    signatures_KP: np.ndarray  # uint32, their MinHash values


def _sets(shingles, documents_K, signatures_PD):
    num_bits = np.uint64(64 - max(1, (documents_K.size - 1).bit_length()))
    counts_K = (shingles.starts_D1[1:] - shingles.starts_D1[:-1])[documents_K]
    numbers_K = np.arange(documents_K.size, dtype=np.uint64) << num_bits
    keys = np.repeat(numbers_K, counts_K)
    keys |= shingles.hashes_S[ranges(shingles.starts_D1[documents_K], counts_K)] >> (np.uint64(64) - num_bits)
    keys.sort()
    keys = keys[np.append(True, keys[1:] != keys[:-1])[: keys.size]]
    return _Sets(keys, np.append(np.searchsorted(keys, numbers_K), keys.size), num_bits,
                 np.ascontiguousarray(signatures_PD[:, documents_K].T))


class _Comparison:
    """Which pairs of documents, the smaller number first, are similar; each pair is compared once, whatever bands it
    shares."""

    def __init__(self, sets, threshold):
        self.sets, self.threshold = sets, threshold
        self._sizes_K = np.diff(sets.starts_K1)
        self._different = np.zeros(0, np.int64)  # pairs, as left * K + right, in order

    def similar(self, left_Q, right_Q):
        """The pairs (left, right) among these."""
        pairs_Q = np.unique(left_Q * self._sizes_K.size + right_Q)
        places = np.searchsorted(self._different, pairs_Q)
        if self._different.size:
            pairs_Q = pairs_Q[self._different[np.minimum(places, self._different.size - 1)] != pairs_Q]
        left_Q, right_Q = np.divmod(pairs_Q, self._sizes_K.size)
        are_similar = np.zeros(pairs_Q.size, bool)
        possible = np.flatnonzero(self._may_be_similar(left_Q, right_Q))
        are_similar[possible] = _jaccard(self.sets, left_Q[possible], right_Q[possible]) >= self.threshold
        self._different = np.sort(np.concatenate([self._different, pairs_Q[~are_similar]]))
        return left_Q[are_similar], right_Q[are_similar]

    def _may_be_similar(self, left_Q, right_Q):
        """bool: not those whose sizes differ too much, or whose values agree less often than four standard deviations
        below the threshold."""
        signatures_KP, threshold = self.sets.signatures_KP, self.threshold
        num_permutations = signatures_KP.shape[1]
        least = num_permutations * threshold - 4 * np.sqrt(num_permutations * threshold * (1 - threshold))
        left_sizes, right_sizes = self._sizes_K[left_Q], self._sizes_K[right_Q]
        may_be = np.minimum(left_sizes, right_sizes) >= threshold * np.maximum(left_sizes, right_sizes)
        for begin in range(0, left_Q.size if least > 0 else 0, _CHUNK_PAIRS):
            chunk = slice(begin, begin + _CHUNK_PAIRS)
            may_be[chunk] &= (signatures_KP[left_Q[chunk]] == signatures_KP[right_Q[chunk]]).sum(1) >= least
        return may_be


def _jaccard(sets, left_Q, right_Q):
    """Jaccard similarities float64 [Q] of pairs of documents with shingles."""
    sizes_K = np.diff(sets.starts_K1)
    swap = sizes_K[left_Q] > sizes_K[right_Q]
    left_Q, right_Q = np.where(swap, right_Q, left_Q), np.where(swap, left_Q, right_Q)
    similarities_Q = np.zeros(left_Q.size)
    # Every shingle of the smaller set is looked up in the larger one, a bounded number at a time.
    ends = np.cumsum(sizes_K[left_Q])
    for chunk in np.split(np.arange(left_Q.size), np.flatnonzero(np.diff(ends // _CHUNK_LOOKUPS)) + 1):
        if not chunk.size:
            continue
        left, right = left_Q[chunk], right_Q[chunk]
        sizes = sizes_K[left]
        lookups = sets.keys[ranges(sets.starts_K1[left], sizes)]
        lookups += np.repeat((right - left).astype(np.uint64) << sets.num_bits, sizes)  # modulo 2^64
        places = np.searchsorted(sets.keys, lookups)
        found = sets.keys[np.minimum(places, sets.keys.size - 1)] == lookups
        shared = np.add.reduceat(found, np.cumsum(sizes) - sizes, dtype=np.int64)
        similarities_Q[chunk] = shared / (sizes + sizes_K[right] - shared)
    return similarities_Q


def _pairs_with_first(compare, members, starts, sizes):
    """Yields (left, right) of the similar pairs (first, other) of every run of members."""
    yield compare.similar(np.repeat(members[starts], sizes - 1), members[ranges(starts + 1, sizes - 1)])


def _pairs(compare, members, starts, sizes):
    """Yields (left, right) of the similar ones of all pairs of every run of members, some at a time."""
    # Documents that share a long text and little else meet in long runs in every band, thousands of shingles a pair to
    # look up in vain; a matrix product of the shingles that occur twice counts all pairs of a run at once.
    for start, size in zip(starts[sizes > _LONG_RUN], sizes[sizes > _LONG_RUN], strict=True):
        run = members[start : start + size]
        for first, similarities in _similarities(compare.sets, run):
            left, right = np.nonzero(similarities >= compare.threshold)
            yield run[first + left], run[right]
    members = members[np.repeat(sizes <= _LONG_RUN, sizes)]
    sizes = sizes[sizes <= _LONG_RUN]
    num_after = np.repeat(np.cumsum(sizes), sizes) - np.arange(members.size) - 1
    yield compare.similar(np.repeat(members, num_after), members[ranges(np.arange(members.size) + 1, num_after)])


def _similarities(sets, members_M):
    """Yields (first row, Jaccard similarities of some rows with all columns) of the matrix of all pairs of members."""
    sizes_M = np.diff(sets.starts_K1)[members_M]
    ids = sets.keys[ranges(sets.starts_K1[members_M], sizes_M)] & ((np.uint64(1) << sets.num_bits) - np.uint64(1))
    _, ids, counts = np.unique(ids, return_inverse=True, return_counts=True)
    column_of_id = np.cumsum(counts > 1) - 1
    shared = counts[ids] > 1  # what one member alone has is in no intersection
    rows, columns = np.repeat(np.arange(members_M.size), sizes_M)[shared], column_of_id[ids[shared]]
    num_rows, num_columns = (max(1, room // members_M.size) for room in (_DENSE_RESULTS, _DENSE_OPERANDS))
    for first in range(0, members_M.size, num_rows):
        counts_RM = np.zeros((min(num_rows, members_M.size - first), members_M.size), np.float32)
        for column in range(0, column_of_id[-1] + 1, num_columns):
            inside = (columns >= column) & (columns < column + num_columns)
            has = np.zeros((members_M.size, min(num_columns, column_of_id[-1] + 1 - column)), np.float32)
            has[rows[inside], columns[inside] - column] = 1
            counts_RM += has[first : first + num_rows] @ has.T
        counts_RM = counts_RM.astype(np.float64)
        yield first, counts_RM / (sizes_M[first : first + num_rows, None] + sizes_M - counts_RM)


def join(components_K, left_Q, right_Q):
    """components_K with the components of each pair made one, named by its least member."""
    components_K = components_K.copy()
    while True:
        left, right = components_K[left_Q], components_K[right_Q]
        if np.array_equal(left, right):
            return components_K
        np.minimum.at(components_K, np.maximum(left, right), np.minimum(left, right))
        while not np.array_equal(further := components_K[components_K], components_K):
            components_K = further
