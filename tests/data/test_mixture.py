"""Oracles: shares counted in every window by Python, the table of the report's pre-training mixture."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindpangu.config import MixConfig
from mindpangu.data import mixture as mixture_module
from mindpangu.data.mixture import Mixture, MixtureSource, mix_samples

# Table 2 of the openPangu Embedded-1B report: general, reasoning and annealing phase.
DATASETS = ("English", "Chinese", "Multi-lingual", "Industrial", "Instruction", "STEM", "Code")
PHASES = {"general": (0.45, 0.12, 0.10, 0.07, 0.02, 0.07, 0.17),
          "reasoning": (0.22, 0.12, 0.04, 0.10, 0.10, 0.20, 0.22),
          "annealing": (0.22, 0.11, 0.03, 0.08, 0.20, 0.17, 0.19)}


def largest_difference(counts, share, window):
    """Over all windows in a row, between a share and the wanted one; counts: (own, all) of each sample."""
    own, everything = (sum(column) for column in zip(*counts[:window], strict=True))
    largest = abs(own / everything - share)
    for (old_own, old_all), (new_own, new_all) in zip(counts, counts[window:], strict=False):
        own, everything = own + new_own - old_own, everything + new_all - old_all
        largest = max(largest, abs(own / everything - share))
    return largest


@pytest.mark.parametrize("phase", PHASES)
def test_every_window_of_10k_samples_has_the_papers_shares_to_one_percent(phase):
    sources = [MixtureSource(name, 3000, weight=weight, max_epochs=10) for name, weight in
               zip(DATASETS, PHASES[phase], strict=True)]
    mixture = Mixture(sources, 31_234, seed=1)
    drawn = [source for source, _ in mixture]
    assert len(drawn) == 31_234
    for i, (weight, mixed) in enumerate(zip(PHASES[phase], mixture.report, strict=True)):
        difference = largest_difference([(source == i, 1) for source in drawn], weight, 10_000)
        # Of the share itself, not only of the whole: a source of 2 % has 198 to 202 samples in every window.
        assert difference <= 0.01 * max(weight, 0.04)
        assert mixed.window_error == pytest.approx(difference, abs=1e-12)
        assert abs(mixed.num_samples - weight * 31_234) < 1
        assert mixed.wanted == pytest.approx(weight) and mixed.share == mixed.num_samples / 31_234
        assert mixed.epochs == mixed.num_samples / 3000


def test_reasoning_to_other_is_three_to_one_in_every_window_by_samples():
    sources = [MixtureSource("maths", 9000, group="reasoning"), MixtureSource("code", 3000, group="reasoning"),
               MixtureSource("chat", 50, group="other", weight=1, max_epochs=100),
               MixtureSource("writing", 5000, group="other", weight=3)]
    mixture = Mixture(sources, 16_000, ratio={"reasoning": 3, "other": 1})
    names = [sources[source].name for source, _ in mixture]
    reasoning = [(name in ("maths", "code"), 1) for name in names]
    assert largest_difference(reasoning, 0.75, 10_000) < 0.001 and largest_difference(reasoning, 0.75, 100) < 0.05
    # Without weights a group is divided by size, 3 to 1, with them as they say.
    assert Counter(names) == {"maths": 9000, "code": 3000, "chat": 1000, "writing": 3000}
    assert [mixed.epochs for mixed in mixture.report] == [1, 1, 20, 0.6]


def test_reasoning_to_other_is_three_to_one_in_every_window_by_tokens():
    rng = np.random.default_rng(0)
    long = np.minimum(rng.lognormal(6, 1.5, 30_000), 32_768).astype(int) + 1
    short = rng.integers(1, 400, 30_000)
    sources = [MixtureSource("reasoning", 30_000, long, group="reasoning"),
               MixtureSource("other", 30_000, short, group="other")]
    mixture = Mixture(sources, unit="tokens", ratio={"reasoning": 3, "other": 1}, size=15_000_000)
    counts = [(long[sample] if source == 0 else 0, (long, short)[source][sample]) for source, sample in mixture]
    difference = largest_difference(counts, 0.75, 10_000)
    assert difference < 0.01 and mixture.report[0].window_error == pytest.approx(difference, abs=1e-12)
    total = sum(count for _, count in counts)
    assert 15_000_000 - 32_768 - 400 <= total <= 15_000_000
    assert mixture.report[1].share == pytest.approx(0.25, abs=0.001)
    assert mixture.report[1].epochs == pytest.approx(0.25 * 15_000_000 / short.sum(), rel=0.001)


lists_of_sources = st.lists(st.tuples(st.integers(1, 40), st.floats(0.01, 10), st.integers(1, 5)), min_size=1,
                            max_size=5)


@settings(deadline=None, max_examples=60)
@given(lists_of_sources, st.sampled_from(["samples", "tokens"]), st.integers(0, 5), st.data())
def test_samples_are_seen_equally_often_and_no_window_strays(drawn, unit, seed, data):
    rng = np.random.default_rng(seed)
    sources = [MixtureSource(f"s{i}", num, rng.integers(1, 50, num), weight, max_epochs=epochs)
               for i, (num, weight, epochs) in enumerate(drawn)]
    try:
        mixture = Mixture(sources, None, unit, seed=seed)
    except ValueError as error:  # one source is so small that the others get less than a sample
        assert "expected at least 1" in str(error) or "no source has a sample so short" in str(error)
        return
    order = list(mixture)
    whole = sum(weight for _, weight, _ in drawn)
    lengths = [source.lengths_N if unit == "tokens" else np.ones(source.num_samples, int) for source in sources]
    for i, source in enumerate(sources):
        times_seen = Counter(sample for which, sample in order if which == i)
        seen = [times_seen[sample] for sample in range(source.num_samples)]
        assert max(seen) - min(seen) <= 1 and max(seen) <= source.max_epochs
        own = [sample for which, sample in order if which == i][:source.num_samples]
        assert len(set(own)) == len(own), "each once before any comes again"
    start = data.draw(st.integers(0, len(order)))
    end = data.draw(st.integers(start, len(order)))
    counts = [sum(lengths[i][sample] for which, sample in order[start:end] if which == i) for i in range(len(sources))]
    longest = [one.max() for one in lengths]
    for i, source in enumerate(sources):
        share = source.weight / whole
        assert abs(counts[i] - share * sum(counts)) <= 2 * longest[i] + share * sum(longest) + 1e-6
    # The same again, and from any place on.
    again = Mixture(sources, None, unit, seed=seed)
    again.load_state_dict({**mixture.state_dict(), "place": start})
    assert list(again) == order[start:]


def test_a_mixture_goes_on_where_its_state_says_and_refuses_another_ones():
    sources = [MixtureSource("a", 30), MixtureSource("b", 10)]
    mixture = Mixture(sources, 100)
    head = [next(mixture) for _ in range(37)]
    state = mixture.state_dict()
    resumed = Mixture(sources, 100)
    resumed.load_state_dict(state)
    assert [*head, *resumed] == list(Mixture(sources, 100))
    for other in (Mixture(sources, 99), Mixture(sources, 100, seed=1), Mixture([sources[0]], 100)):
        with pytest.raises(ValueError, match="place 37 is of another mixture"):
            other.load_state_dict(state)


def test_the_order_within_a_source_depends_on_seed_and_name_alone():
    def order(sources, **options):
        return [sample for source, sample in Mixture(sources, 200, **options) if sources[source].name == "a"]

    a = MixtureSource("a", 100, weight=1)
    alone, beside = order([a]), order([MixtureSource("b", 100, weight=1), a])
    assert alone[:100] == beside and sorted(beside) == list(range(100)) and beside != sorted(beside)
    assert order([a], seed=1) != alone
    assert [sample for _, sample in Mixture([a._replace(name="c")], 100)] != beside


def test_a_curriculum_goes_from_easy_to_hard_over_all_epochs_and_changes_no_share():
    labels = np.tile([3, 1, 2], 200)
    sources = [MixtureSource("maths", 600, difficulty_N=labels, group="reasoning", max_epochs=2.5),
               MixtureSource("chat", 1000, group="other")]
    mixture = Mixture(sources, 2000, ratio={"reasoning": 3, "other": 1})
    order = list(mixture)
    maths = [sample for source, sample in order if source == 0]
    assert labels[maths].tolist() == sorted(labels[maths]) and len(maths) == 1500
    assert set(Counter(maths).values()) == {2, 3}, "two epochs and half of a third"
    easy = maths[:200]
    assert set(easy) <= set(np.flatnonzero(labels == 1)) and easy != sorted(easy), "equals in random order"
    flat = Mixture([sources[0]._replace(difficulty_N=None), sources[1]], 2000, ratio={"reasoning": 3, "other": 1})
    assert [source for source, _ in order] == [source for source, _ in flat]


def test_the_bound_on_epochs_ends_the_mixture_or_refuses_its_size():
    sources = [MixtureSource("large", 10_000, weight=3), MixtureSource("small", 100, weight=1, max_epochs=1.5)]
    mixture = Mixture(sources)
    assert Counter(source for source, _ in mixture) == {0: 450, 1: 150}
    assert mixture.report[1].epochs == 1.5
    with pytest.raises(ValueError, match=r"size=601 samples: source 'small' at a share of 0.25 would be seen 1.502 "
                                         r"times, max_epochs=1.5: expected a size of at most 600"):
        Mixture(sources, 601)


@pytest.mark.parametrize(("change", "options", "reason"), [
    ({}, {"unit": "bytes"}, "unit='bytes'"),
    ({}, {"unit": "tokens"}, "'a' has no lengths_N"),
    ({}, {"size": 0}, "size=0 samples: expected at least 1"),
    ({}, {"ratio": {"reasoning": 3, "other": 1}}, "'a' is of group None: expected one of ratio's, reasoning, other"),
    ({"group": "reasoning"}, {"ratio": {"reasoning": 3, "other": 1}}, "ratio has 'other', but no source"),
    ({"group": "reasoning"}, {"ratio": {"reasoning": 0}}, "ratio of 'reasoning' is 0"),
    ({"weight": 2}, {}, "weight of 'a' is None: expected a positive number for each, or for none"),
    ({"weight": float("nan")}, {}, "weight of"),
    ({"num_samples": 0}, {}, "'b' has no samples"),
    ({"max_epochs": 0}, {}, "'b': max_epochs=0"),
    ({"name": "a"}, {}, r"sources named \['a', 'a'\]"),
    ({"difficulty_N": np.zeros(3)}, {}, r"difficulty_N of shape \(3,\): expected a finite number for each of its 10"),
    ({"difficulty_N": np.full(10, np.nan)}, {}, "difficulty_N .*finite"),
    ({"lengths_N": np.array([3] * 9 + [0])}, {"unit": "tokens"}, "sample 9 has 0 tokens"),
    ({"lengths_N": np.full(10, 50)}, {"unit": "tokens", "size": 60}, "no source has a sample so short"),
])
def test_what_does_not_fit_is_refused_by_name(change, options, reason):
    a = MixtureSource("a", 10, lengths_N=np.full(10, 50) if "lengths_N" in change else None, group=change.get("group"))
    with pytest.raises(ValueError, match=reason):
        Mixture([a, MixtureSource("b", 10)._replace(**change)], **{"size": 10, **options})


def test_no_sources_are_refused():
    with pytest.raises(ValueError, match="expected at least one"):
        Mixture([])


LABELS = ["maths"] * 60 + ["code"] * 40 + ["chat"] * 300
DIFFICULTY = np.array([i % 7 for i in range(400)], float)


def mixed(labels=LABELS, size=None, lengths=None, difficulty=DIFFICULTY, at_most=False, **options):
    lengths = np.full(len(labels), 10) if lengths is None else lengths
    categories = ["unused", "chat", "maths", "code", "law", "maths"]  # as of sources, of which two have problems
    places = [5 if label == "maths" and i % 3 else categories.index(label) for i, label in enumerate(labels)]
    return mix_samples(MixConfig(**{"unit": "samples"} | options), categories, np.array(places, np.uint16), lengths,
                       difficulty[:len(labels)], size, 0, at_most)


def test_samples_are_mixed_by_their_categories():
    weights = {"maths": 0.2, "code": 0.1, "chat": 0.1}  # which need not sum to 1
    found = mixed(weights=weights, size=320)
    assert Counter(LABELS[i] for i in found.order_M) == {"maths": 160, "code": 80, "chat": 80}
    assert {part.name: part.epochs for part in found.report} == {"maths": 160 / 60, "code": 2, "chat": 80 / 300}
    with pytest.raises(ValueError, match="size=1000 samples: source 'maths' at a share of 0.5 would be seen 8.333"):
        mixed(weights=weights, size=1000)
    assert len(mixed(weights=weights, size=1000, at_most=True).order_M) == 480
    # Without a size every sample is seen, where max_epochs allow it; by size each once.
    assert Counter(mixed().order_M.tolist()) == dict.fromkeys(range(400), 1)
    everything = mixed(weights={"maths": 1, "code": 1, "chat": 8})
    assert set(everything.order_M.tolist()) == set(range(400)) and len(everything.order_M) == 600
    assert len(mixed(weights=weights).order_M) == 480


def test_groups_have_the_ratio_by_tokens():
    lengths = np.random.default_rng(0).integers(5, 50, len(LABELS))
    found = mixed(lengths=lengths, unit="tokens", ratio={"reasoning": 3, "other": 1},
                  groups={"reasoning": ["maths", "code"]}, size=6000)
    tokens = Counter()
    for i in found.order_M:
        tokens["other" if LABELS[i] == "chat" else "reasoning"] += int(lengths[i])
    assert tokens["reasoning"] / tokens.total() == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize("curriculum", [["maths", "code"], ["reasoning"]])
def test_a_curriculum_goes_from_easy_to_hard_in_its_categories_alone(curriculum):
    order = mixed(ratio={"reasoning": 3, "other": 1}, groups={"reasoning": ["maths", "code"]}, curriculum=curriculum,
                  size=200).order_M
    for name in ("maths", "code", "chat"):
        labels = [DIFFICULTY[i] for i in order if LABELS[i] == name]
        assert (labels == sorted(labels)) == (name != "chat")


def test_samples_of_unknown_difficulty_come_in_the_middle():
    difficulty = np.where(np.arange(400) < 20, np.nan, DIFFICULTY)
    order = mixed(curriculum=["maths"], difficulty=difficulty, size=200).order_M.tolist()
    own = [i for i in order if LABELS[i] == "maths"]
    labels = [np.median(DIFFICULTY[20:]) if i < 20 else DIFFICULTY[i] for i in own]
    assert labels == sorted(labels) and any(i < 20 for i in own)


def test_missing_categories_are_errors_or_listed():
    weights = {"maths": 1, "code": 1, "chat": 1, "poems": 2}
    with pytest.raises(ValueError, match=r"mix has a share of poems, of which there is no sample.*on_missing=renorm"):
        mixed(weights=weights)
    found = mixed(weights=weights, on_missing="renormalise", size=90)
    assert Counter(LABELS[i] for i in found.order_M) == {"maths": 30, "code": 30, "chat": 30}
    assert found.missing == ["poems"]
    with pytest.raises(ValueError, match="mix.weights has none of category chat"):
        mixed(weights={"maths": 1, "code": 1})
    with pytest.raises(ValueError, match="mix.ratio has nothing of group other"):
        mixed(ratio={"a": 1}, groups={"a": ["maths", "code"]})
    alone = mixed(ratio={"a": 3, "other": 1}, groups={"a": LABELS[:1] + LABELS[60:61] + LABELS[-1:]},
                  on_missing="renormalise")
    assert alone.missing == ["group other"] and len(alone.order_M) == 400


def test_the_report_does_not_depend_on_how_many_windows_are_looked_at_together(monkeypatch):
    rng = np.random.default_rng(0)
    sources = [MixtureSource(name, 20_000, rng.integers(1, 1000, 20_000), weight)
               for name, weight in (("maths", 3.0), ("chat", 1.0))]
    whole = Mixture(sources, unit="tokens").report
    monkeypatch.setattr(mixture_module, "_WINDOWS", 777)
    assert Mixture(sources, unit="tokens").report == whole
    assert all(part.window_error > 0 for part in whole)
