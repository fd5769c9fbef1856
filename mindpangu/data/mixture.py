"""Mixture: which sample of which source comes when, so that every stretch of the data has the wanted shares."""

# N samples of a source, M samples of the mixture
import math
from typing import NamedTuple

import numpy as np
import xxhash

WINDOW = 10_000  # samples over which shares are reported
_WINDOWS = 1 << 16  # that are looked at together


class MixtureSource(NamedTuple):
    """num_samples: how many it has. lengths_N: their tokens, needed with unit="tokens".

    weight: its share of the mixture, or of its group, relative to the others'; None, then for all of them: its size.
    group: its name in the mixture's ratio, for example "reasoning". max_epochs: how often its samples may be seen; up
    to 4 times trains nearly as well as new data (Muennighoff et al. 2023, arXiv:2305.16264).
    difficulty_N: labels; the samples come from the smallest to the largest then, over the whole mixture, in random
    order among equals. None: in random order, each once before any comes again.
    """

    name: str
    num_samples: int
    lengths_N: np.ndarray | None = None
    weight: float | None = None
    group: str | None = None
    max_epochs: float = 4.0
    difficulty_N: np.ndarray | None = None


class MixedSource(NamedTuple):
    """What a mixture has of a source."""

    name: str
    wanted: float  # share of the samples or tokens, as the weights say
    share: float  # the mixture's
    num_samples: int
    epochs: float  # its samples, or tokens, over those that it has
    window_error: float  # largest difference from the wanted share, over all windows of WINDOW samples in a row


class Mixture:
    """An iterator over (source, sample), indices both; its place is an integer.

    size: samples or tokens, as unit says; a mixture of tokens may lack up to a sample of each source. None: what it
    takes to see every sample, or as many as max_epochs allow. ratio: {group: weight}, for example {"reasoning": 3,
    "other": 1}; None: the sources' weights are of the whole. seed: the order within each source, which depends on
    nothing else but its name and size.

    Of any samples in a row, those of a source of share w, of S sources, are within 2 + S w samples of the wanted
    number; with unit="tokens" within 2 L + w (sum of L) tokens of it, L the longest sample of each source.
    Holds 12 bytes a sample. report: a MixedSource per source.
    Raises ValueError for weights, ratios and labels that don't fit, and for a size that would take a source more often
    than its max_epochs: its shares are never changed to make do.
    """

    def __init__(self, sources, size=None, unit="samples", ratio=None, seed=0):
        if unit not in ("samples", "tokens"):
            raise ValueError(f"unit={unit!r}: expected 'samples' or 'tokens'.")
        lengths = [_lengths(source, unit) for source in sources]
        shares = _shares(sources, [int(lengths_N.sum()) for lengths_N in lengths], ratio)
        size = _size(sources, shares, lengths, size, unit)
        wanted = size * np.array(shares)
        if unit == "samples":
            wanted = _whole(wanted, size)
        drawn, times = [], []
        for source, lengths_N, amount in zip(sources, lengths, wanted, strict=True):
            drawn.append(_draw(source, lengths_N, amount, seed))
            # Its samples are spread evenly over the time from 0 to 1, by what they count.
            counts = lengths_N[drawn[-1]]
            times.append((np.cumsum(counts) - _random(seed, source, "phase").random() * counts) / counts.sum())
        if not any(map(len, drawn)):
            raise ValueError(f"size={size} {unit}: no source has a sample so short: expected a larger size.")
        order_M = np.argsort(np.concatenate(times), kind="stable")
        del times, counts
        self.source_M = np.repeat(np.arange(len(sources), dtype=np.int32), [len(one) for one in drawn])[order_M]
        self.sample_M = np.concatenate(drawn)[order_M]
        del drawn, order_M
        self.report = _report(sources, shares, lengths, self.source_M, self.sample_M)
        self._digest = xxhash.xxh3_128_hexdigest(self.source_M.tobytes() + self.sample_M.tobytes())
        self._place = 0

    def __len__(self):
        return self.source_M.size

    def __iter__(self):
        return self

    def __next__(self):
        if self._place == len(self):
            raise StopIteration
        self._place += 1
        return int(self.source_M[self._place - 1]), int(self.sample_M[self._place - 1])

    def state_dict(self):
        """The place in the mixture: samples already delivered, and which mixture it is."""
        return {"place": self._place, "digest": self._digest}

    def load_state_dict(self, state):
        """Goes to the place. Raises ValueError if the state is that of another mixture."""
        if state["digest"] != self._digest or not 0 <= state["place"] <= len(self):
            raise ValueError(
                f"place {state['place']} is of another mixture ({state['digest']}) than this one of {len(self)} "
                f"samples ({self._digest}): resume with the sources, weights, size and seed of the interrupted run, "
                "or start again."
            )
        self._place = state["place"]


class OrderedMixture(NamedTuple):
    """order_M: int64, of each sample of the mixture its place among all samples. report: a MixedSource per category.
    missing: categories and groups that have a weight and no sample, left out."""

    order_M: np.ndarray
    report: list
    missing: list


def mix_samples(mix, categories, category_N, lengths_N, difficulty_N, size, seed, at_most=False):
    """The OrderedMixture of N samples of many categories, as a MixConfig says.

    categories: names, which may repeat. category_N: of each sample, the place of its own among them. lengths_N: their
    tokens. difficulty_N: labels, not a number where unknown, which count as the middle. size: samples or tokens, as
    mix.unit says; None: as Mixture; with at_most, more than mix.max_epochs allow is as many as they do.
    Raises ValueError as Mixture, and for weights of categories without a sample and categories without a weight.
    """
    places = {}
    for p in np.flatnonzero(np.bincount(category_N)).tolist():
        places.setdefault(categories[p], []).append(p)
    names = sorted(places)
    members = [np.flatnonzero(np.isin(category_N, places[name])) for name in names]
    group_of = {category: group for group, categories in mix.groups.items() for category in categories}
    groups = {name: group_of.get(name, "other") for name in names}
    missing = [name for name in mix.weights if name not in places]
    missing += [f"group {group}" for group in mix.ratio if group not in groups.values()]
    if missing and mix.on_missing == "raise":
        raise ValueError(f"mix has a share of {', '.join(missing)}, of which there is no sample; there are "
                         f"{', '.join(names)}: add a source of that category, or set mix.on_missing=renormalise.")
    unweighted = [name for name in names if mix.weights and name not in mix.weights]
    if unweighted:
        raise ValueError(f"mix.weights has none of category {', '.join(unweighted)}: give it a weight, or leave its "
                         "source out.")
    unlisted = sorted({groups[name] for name in names} - mix.ratio.keys()) if mix.ratio else []
    if unlisted:
        raise ValueError(f"mix.ratio has nothing of group {', '.join(unlisted)}: give it a weight, or put its "
                         "categories into another group in mix.groups.")
    known = np.isfinite(difficulty_N)
    unknown = np.median(difficulty_N[known]) if known.any() else 0.0
    sources = []
    for name, own in zip(names, members, strict=True):
        is_ordered = name in mix.curriculum or groups[name] in mix.curriculum
        labels = np.where(known[own], difficulty_N[own], unknown) if is_ordered else None
        sources.append(MixtureSource(name, own.size, lengths_N[own], mix.weights.get(name), groups[name],
                                     mix.max_epochs, labels))
    ratio = {group: weight for group, weight in mix.ratio.items() if group in groups.values()} or None
    if at_most and size is not None:
        lengths = [_lengths(source, mix.unit) for source in sources]
        shares = _shares(sources, [int(one.sum()) for one in lengths], ratio)
        size = min(size, _largest(sources, shares, lengths, mix.unit)[0])
    mixture = Mixture(sources, size, mix.unit, ratio, seed)
    order_M = np.empty(len(mixture), np.int64)
    for p, own in enumerate(members):
        here = mixture.source_M == p
        order_M[here] = own[mixture.sample_M[here]]
    return OrderedMixture(order_M, mixture.report, missing)


def _lengths(source, unit):
    """What each sample counts."""
    if source.num_samples < 1:
        raise ValueError(f"source {source.name!r} has no samples: leave it out.")
    if not source.max_epochs > 0:
        raise ValueError(f"source {source.name!r}: max_epochs={source.max_epochs}: expected above 0.")
    for name in ("lengths_N", "difficulty_N"):
        values = getattr(source, name)
        if values is not None and (np.shape(values) != (source.num_samples,) or not np.isfinite(values).all()):
            raise ValueError(f"source {source.name!r}: {name} of shape {np.shape(values)}: expected a finite number "
                             f"for each of its {source.num_samples} samples.")
    if unit == "samples":
        return np.ones(source.num_samples, np.int64)
    if source.lengths_N is None:
        raise ValueError(f"source {source.name!r} has no lengths_N: unit='tokens' needs the tokens of its samples.")
    lengths_N = np.asarray(source.lengths_N, np.int64)
    if lengths_N.min() < 1:
        raise ValueError(f"source {source.name!r}: sample {lengths_N.argmin()} has {lengths_N.min()} tokens: leave "
                         "out samples without tokens.")
    return lengths_N


def _shares(sources, sizes, ratio):
    """Each source's share of the mixture; they sum to 1."""
    names = [source.name for source in sources]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"sources named {names}: expected at least one, each with a name of its own.")
    if ratio is None:
        groups = {None: 1.0}
        members = {None: list(range(len(sources)))}
    else:
        groups = ratio
        members = {group: [i for i, source in enumerate(sources) if source.group == group] for group in groups}
        for source in sources:
            if source.group not in groups:
                raise ValueError(f"source {source.name!r} is of group {source.group!r}: expected one of ratio's, "
                                 f"{', '.join(groups)}.")
    _check_weights("ratio", groups)
    shares = [0.0] * len(sources)
    for group, weight in groups.items():
        if not members[group]:
            raise ValueError(f"ratio has {group!r}, but no source is of that group: add one, or leave it out of ratio.")
        weights = {sources[i].name: sources[i].weight for i in members[group]}
        if all(value is None for value in weights.values()):
            weights = {sources[i].name: sizes[i] for i in members[group]}
        _check_weights("weight", weights)
        for i in members[group]:
            shares[i] = weight / sum(groups.values()) * weights[sources[i].name] / sum(weights.values())
    return shares


def _check_weights(what, weights):
    for name, weight in weights.items():
        if weight is None or not 0 < weight < np.inf:
            raise ValueError(f"{what} of {name!r} is {weight}: expected a positive number for each, or for none.")


def _largest(sources, shares, lengths, unit):
    """(the largest size that max_epochs allow, the place of the source whose it is)."""
    limits = [source.max_epochs * lengths_N.sum() for source, lengths_N in zip(sources, lengths, strict=True)]
    if unit == "samples":
        limits = np.floor(limits)
    largest = [limit / share for limit, share in zip(limits, shares, strict=True)]
    tightest = int(np.argmin(largest))
    return int(largest[tightest] * (1 + 1e-12)), tightest


def _size(sources, shares, lengths, size, unit):
    """The size of the mixture, at most what max_epochs allow."""
    most, tightest = _largest(sources, shares, lengths, unit)
    if size is None:
        all_once = max(lengths_N.sum() / share for lengths_N, share in zip(lengths, shares, strict=True))
        size = min(most, math.ceil(all_once * (1 - 1e-12)))
    if not 1 <= size <= most:
        source = sources[tightest]
        if size > most:
            epochs = size * shares[tightest] / lengths[tightest].sum()
            raise ValueError(
                f"size={size} {unit}: source {source.name!r} at a share of {shares[tightest]:.4g} would be seen "
                f"{epochs:.4g} times, max_epochs={source.max_epochs}: expected a size of at most {most}, a larger "
                "max_epochs, or a smaller weight of that source."
            )
        raise ValueError(f"size={size} {unit}: expected at least 1; source {source.name!r} allows {most}.")
    return size


def _whole(wanted, size):
    """Whole numbers next to the wanted ones that sum to size: the largest remainders are rounded up."""
    whole = np.floor(wanted)
    whole[np.argsort(whole - wanted, kind="stable")[: size - int(whole.sum())]] += 1
    return whole


def _draw(source, lengths_N, amount, seed):
    """The samples of a source in their order, as many as count for no more than the amount."""
    num_epochs = max(1, int(np.ceil(amount / lengths_N.sum())))
    drawn = np.concatenate([_random(seed, source, epoch).permutation(source.num_samples)
                            for epoch in range(num_epochs)])
    # What samples count are whole numbers; an amount may lack a rounding error.
    drawn = drawn[: np.searchsorted(np.cumsum(lengths_N[drawn]), amount + 1e-6, side="right")]
    if source.difficulty_N is not None:
        drawn = drawn[np.argsort(np.asarray(source.difficulty_N)[drawn], kind="stable")]
    return drawn


def _random(seed, source, what):
    """A generator that depends on the source by its name: those of others don't change with it."""
    seeds = np.random.SeedSequence([seed, xxhash.xxh3_64_intdigest(f"{what}:{source.name}".encode())])
    return np.random.Generator(np.random.Philox(seeds))


def _report(sources, shares, lengths, source_M, sample_M):
    counts_M = np.zeros(source_M.size, np.int64)
    for i, lengths_N in enumerate(lengths):
        counts_M[source_M == i] = lengths_N[sample_M[source_M == i]]
    report = []
    window = min(WINDOW, source_M.size)
    totals_M1 = _sums(counts_M)
    for i, (source, wanted, lengths_N) in enumerate(zip(sources, shares, lengths, strict=True)):
        own_M1 = _sums(counts_M, source_M == i)
        error = 0.0
        for first in range(0, source_M.size - window + 1, _WINDOWS):
            end = min(first + _WINDOWS, source_M.size - window + 1)
            own, totals = (sums_M1[first + window : end + window] - sums_M1[first:end]
                           for sums_M1 in (own_M1, totals_M1))
            error = max(error, float(np.abs(own / totals - wanted).max()))
        report.append(MixedSource(source.name, wanted, own_M1[-1] / totals_M1[-1], int((source_M == i).sum()),
                                  own_M1[-1] / int(lengths_N.sum()), error))
    return report


def _sums(counts_M, is_counted_M=True):
    """int64 [M + 1]: the sums of the first 0, 1, ... that are counted."""
    sums_M1 = np.zeros(counts_M.size + 1, np.int64)
    np.multiply(counts_M, is_counted_M, out=sums_M1[1:])
    return np.cumsum(sums_M1, out=sums_M1)
