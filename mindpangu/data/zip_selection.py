"""ZIP: the documents that compress worst together, hence repeat least. Source: Yin et al. 2024, arXiv:2407.06645."""

# N documents
import contextlib
import functools
import math
import pickle
import zlib
from typing import NamedTuple

import numpy as np
import zstandard

from .parallel import worker_processes

ENGINES = ("zlib_exact", "zstd")
# The level of the zstd engine, and the most of a history that it refers to: 2^27 bytes, its decoder's default limit.
_LEVEL, _MAX_WINDOW_BITS = 6, 27
_CONTEXT_BYTES = 256  # literals for tables of their own; more takes longer and picks no better
_scorer = None  # in a worker process: what it was made from, and its own _Deflate or _Zstandard


class State(NamedTuple):
    """Where a selection stands after a round: two arrays, to be stored as they are.

    scores_N: float64. zlib_exact: the ratio that a document was last seen to give, infinite once it was among K2.
    zstd: the bytes that it was last seen to add. selected: int64, the documents selected, in order.
    """

    scores_N: np.ndarray
    selected: np.ndarray


def select(documents, budget, engine="zstd", k1=10_000, k2=200, k3=100, strata_N=None, compat=None, num_processes=1,
           state=None, save=None, workers=None):
    """Indices int64 [min(budget, N)] of the documents selected, in order; each at most once.

    documents: strings; or a sequence of UTF-8 bytes, which are read when they are needed, and which a process of its
    own gets pickled.

    Rounds until the budget is reached: of the K1 documents that last compressed worst, those K2 that compress worst
    with all that is selected, and of these greedily K3. "Worst" is the lowest ratio of plain to compressed bytes of
    the selected documents and the candidate as one text; of equal ratios the lowest index.
    engine="zlib_exact" is the published program: deflate at level 9, which looks 32 KiB back, and whose greedy step
    starts anew from the first of the K3. What it lists among K2 but does not select comes back when fewer than K1
    others are left. Added are a tie rule, an end at the budget, no document twice, and K1 above the number of
    documents. Texts are joined by line feeds; compat="repr" compresses the Python repr of the list, as published, of
    documents of any type.
    engine="zstd": the whole history (its last 128 MiB) as a raw-content dictionary, level 6. A candidate counts the
    fewer of the bytes that it adds to the history of earlier rounds and to the round's own picks. They hardly ever
    grow, so only the candidates that seem best are compressed again.
    strata_N: a label per document, say (language, category), for scripts differ in bytes per character: the budget is
    divided in proportion to their numbers of documents (largest remainders, of equal ones the first label), and each
    is selected from by itself, by label. None: one stratum.
    num_processes: the result does not depend on it. Above 1, the caller's main module has to be importable. workers: an
    executor of so many processes, see parallel.worker_processes; None: one of its own.
    state: a State to go on from; save(state) is called after every round.
    Raises ValueError if an argument is none of those, or state belongs to other documents.
    Source: github.com/USTC-StarTeam/ZIP, ZIP.py.
    """
    if engine not in ENGINES or compat not in (None, "repr") or (compat == "repr" and engine != "zlib_exact"):
        raise ValueError(f"engine={engine!r}, compat={compat!r}: expected one of {', '.join(ENGINES)}, and "
                         "compat='repr' with zlib_exact only.")
    if budget < 0 or num_processes < 1 or not 1 <= k3 <= k2 <= k1:
        raise ValueError(f"budget={budget}, k1={k1}, k2={k2}, k3={k3}, num_processes={num_processes}: expected a "
                         "budget of 0 or more, 1 <= k3 <= k2 <= k1, and a process at least.")
    if strata_N is not None and len(strata_N) != len(documents):
        raise ValueError(f"{len(strata_N)} strata for {len(documents)} documents: expected a label for each.")
    if state is not None and len(state.scores_N) != len(documents):
        raise ValueError(f"the state is of {len(state.scores_N)} documents, here are {len(documents)}: a selection "
                         "goes on with the documents that it began with.")
    if engine == "zlib_exact":
        make, select_round = functools.partial(_Deflate, as_list=compat == "repr"), _exact_round
    else:
        make, select_round = _Zstandard, _zstd_round
    texts = documents
    if compat == "repr" or not (len(documents) and isinstance(documents[0], bytes)):
        strings = map(repr, documents) if compat == "repr" else documents
        texts = [string.encode("utf-8", "surrogatepass") for string in strings]
    lengths_N = texts.lengths_N if hasattr(texts, "lengths_N") else np.array([len(text) for text in texts], np.int64)
    with _scoring(make, texts, num_processes, workers) as score:
        if state is None:
            nothing = np.zeros(0, np.int64)
            state = State(score(nothing, np.arange(len(texts))), nothing)
        for members, quota in _quotas(strata_N, len(texts), min(budget, len(texts))):
            selected = state.selected[np.isin(state.selected, members)]
            while selected.size < quota:
                scores_M, picks = select_round(score, state.scores_N[members], np.searchsorted(members, selected),
                                               members, lengths_N, k1, k2, min(k3, quota - selected.size))
                scores_N = state.scores_N.copy()
                scores_N[members] = scores_M
                selected = np.append(selected, picks)
                state = State(scores_N, np.append(state.selected, picks))
                if save is not None:
                    save(state)
    return state.selected[:budget]


def _quotas(strata_N, num_documents, budget):
    """[(indices of a stratum's documents, how many to select)], by label."""
    if strata_N is None:
        return [(np.arange(num_documents), budget)]
    labels = sorted(set(strata_N))
    number = {label: s for s, label in enumerate(labels)}
    stratum_N = np.array([number[label] for label in strata_N], np.int64)
    counts = np.bincount(stratum_N, minlength=len(labels))
    quotas, remainders = np.divmod(budget * counts, max(1, num_documents))
    quotas[np.argsort(-remainders, kind="stable")[: budget - quotas.sum()]] += 1
    return [(np.flatnonzero(stratum_N == s), int(quota)) for s, quota in enumerate(quotas)]


def _lowest(values, k):
    """Indices of the k lowest values, in order; of equal ones the first."""
    return np.argsort(values, kind="stable")[:k]


def _exact_round(score, ratios_M, selected, members, lengths_N, k1, k2, k3):
    """(the ratios_M after it, the picks) of one published round over the documents `members`."""
    ratios_M = ratios_M.copy()
    left = np.setdiff1d(np.arange(ratios_M.size), selected)
    first = np.sort(left[_lowest(ratios_M[left], k1)])
    ratios_M[first] = score(members[selected], members[first])
    second = np.sort(first[_lowest(ratios_M[first], k2)])
    ratios_M[second] = math.inf
    picks, rest = members[:0], members[second]
    while picks.size < k3 and rest.size:
        best = _lowest(score(picks, rest), 1)
        picks, rest = np.append(picks, rest[best]), np.delete(rest, best)
    return ratios_M, picks


def _zstd_round(score, sizes_M, selected, members, lengths_N, k1, k2, k3):
    """(the compressed sizes_M after it, the picks) of one round over the documents `members`."""
    sizes_M, lengths_M = sizes_M.copy(), lengths_N[members] + 1  # its line feed
    plain, compressed = lengths_M[selected].sum(), sizes_M[selected].sum()

    def ratios(which):
        return (plain + lengths_M[which]) / (compressed + sizes_M[which])

    left = np.setdiff1d(np.arange(sizes_M.size), selected)
    first = np.sort(left[_lowest(ratios(left), k1)])
    sizes_M[first] = score(members[selected], members[first])
    rest = np.sort(first[_lowest(ratios(first), k2)])
    picks, seen = rest[:0], np.zeros(rest.size, np.int64)  # seen: how many of the picks a candidate was compressed with
    while picks.size < k3 and rest.size:
        best = int(_lowest(ratios(rest), 1)[0])
        pick = rest[best]
        if seen[best] < picks.size:
            sizes_M[pick] = min(sizes_M[pick], score(members[picks], members[rest[best : best + 1]])[0])
            seen[best] = picks.size
            continue
        picks = np.append(picks, pick)
        plain, compressed = plain + lengths_M[pick], compressed + sizes_M[pick]
        rest, seen = np.delete(rest, best), np.delete(seen, best)
    return sizes_M, members[picks]


class _Deflate:
    """Ratios of plain to compressed bytes of a history and one candidate more; keeps the last history compressed."""

    def __init__(self, texts, as_list):
        self.texts = texts
        self.opening, self.separator, self.closing = (b"[", b", ", b"]") if as_list else (b"", b"\n", b"")
        self._begin()

    def _begin(self):
        self.history, self.compressor, self.plain = [], zlib.compressobj(9), len(self.opening)
        self.compressed = len(self.compressor.compress(self.opening))

    def score(self, history, candidates):
        if history[: len(self.history)] != self.history:
            self._begin()
        for n in history[len(self.history) :]:
            text = self.texts[n] + self.separator
            self.plain += len(text)
            self.compressed += len(self.compressor.compress(text))
            self.history.append(n)
        ratios = []
        for n in candidates:
            compressor = self.compressor.copy()
            text = self.texts[n] + self.closing
            compressed = self.compressed + len(compressor.compress(text)) + len(compressor.flush())
            ratios.append((self.plain + len(text)) / compressed)
        return ratios


class _Zstandard:
    """Bytes, at least 1, that candidates add to a compressed history; keeps the last history digested.

    The end of the history is compressed anew before each candidate, the rest is the dictionary: without it a short
    text has no entropy tables but its own, and seems to say more than a long one.
    """

    def __init__(self, texts):
        self.texts, self.history = texts, None

    def score(self, history, candidates):
        if history != self.history:
            text = b"".join([self.texts[n] + b"\n" for n in history])
            self.history, self.context = history, text[-_CONTEXT_BYTES:]
            self.compressor = _zstd_compressor(text[:-_CONTEXT_BYTES])
            self.compressed = len(self.compressor.compress(self.context))
        added = (len(self.compressor.compress(self.context + self.texts[n] + b"\n")) for n in candidates)
        return [max(1, compressed - self.compressed) for compressed in added]


def _zstd_compressor(history):
    history = history[-(1 << _MAX_WINDOW_BITS) :]
    base = zstandard.ZstdCompressionParameters.from_level(_LEVEL, dict_size=len(history))
    # The level's own tables forget the older part of a history that has more bytes than they have entries.
    bits = min(_MAX_WINDOW_BITS, len(history).bit_length())
    parameters = zstandard.ZstdCompressionParameters.from_level(
        _LEVEL, dict_size=len(history), window_log=max(base.window_log, bits), hash_log=max(base.hash_log, bits),
        chain_log=max(base.chain_log, bits),
        # Bytes that every frame would have weigh on short documents.
        format=zstandard.FORMAT_ZSTD1_MAGICLESS, write_content_size=False, write_dict_id=False, write_checksum=False)
    if not history:
        return zstandard.ZstdCompressor(compression_params=parameters)
    dictionary = zstandard.ZstdCompressionDict(history, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    dictionary.precompute_compress(compression_params=parameters)
    return zstandard.ZstdCompressor(dict_data=dictionary, compression_params=parameters)


@contextlib.contextmanager
def _scoring(make, texts, num_processes, workers):
    """A function (history, candidates) -> float64 scores; of arrays of indices. It works in num_processes processes."""
    scorer = make(texts)
    if num_processes == 1:
        yield lambda history, candidates: np.array(scorer.score(history.tolist(), candidates.tolist()), np.float64)
        return
    made = pickle.dumps((make, texts))
    own = worker_processes(num_processes, _start_worker, (made,)) if workers is None else None
    with own or contextlib.nullcontext(workers) as pool:

        def score(history, candidates):
            if candidates.size < 4 * num_processes:  # handing over takes longer
                return np.array(scorer.score(history.tolist(), candidates.tolist()), np.float64)
            parts = [part.tolist() for part in np.array_split(candidates, num_processes)]
            scores = pool.map(_work, [None if own else made] * num_processes, [history.tolist()] * num_processes, parts)
            return np.concatenate(list(scores))

        yield score


def _start_worker(made):
    global _scorer
    make, texts = pickle.loads(made)
    _scorer = made, make(texts)


def _work(made, history, candidates):
    if made is not None and (_scorer is None or _scorer[0] != made):
        _start_worker(made)
    return np.array(_scorer[1].score(history, candidates), np.float64)
