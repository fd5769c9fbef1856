import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindpangu.data.pack import pack_best_fit


def naive_rooms(lengths, capacity):
    """Remaining tokens of every row after textbook best-fit decreasing, O(samples * rows)."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [(room, row) for row, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting)[1]] -= length
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


def rows_of(lengths, capacity):
    order_N, row_starts_R1 = pack_best_fit(lengths, capacity)
    assert order_N.dtype == row_starts_R1.dtype == np.int64
    assert row_starts_R1[0] == 0 and row_starts_R1[-1] == order_N.size and (np.diff(row_starts_R1) > 0).all()
    assert np.array_equal(np.sort(order_N), np.arange(len(lengths)))
    return [order_N[start:end] for start, end in itertools.pairwise(row_starts_R1)]


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_rows_are_those_of_naive_best_fit_decreasing(data):
    capacity = data.draw(st.integers(1, 1500))
    # A low upper length gives many samples of one length and many per row; word boundaries (256) lie inside the range.
    longest = data.draw(st.integers(1, capacity))
    lengths = data.draw(st.lists(st.integers(1, longest), max_size=120))
    rooms = [capacity - sum(lengths[n] for n in row) for row in rows_of(lengths, capacity)]
    assert min(rooms, default=0) >= 0
    assert sorted(rooms) == naive_rooms(lengths, capacity)


def test_hand_worked_example():
    # 7 and 6 open rows; 5 opens a third; 4 best fits the room of 4 left by 6; 3 that of 7; 2 and 2 go with 5 (room 5).
    rows = rows_of([2, 3, 4, 5, 6, 7, 2], 10)
    assert sorted(sorted([2, 3, 4, 5, 6, 7, 2][n] for n in row) for row in rows) == [[2, 2, 5], [3, 7], [4, 6]]


@pytest.mark.parametrize("mean_log_length", [6.5, 7.5, 8.5])
def test_mixed_lengths_fill_at_least_999_of_1000_tokens_at_32k(mean_log_length):
    draws = np.random.default_rng(0).lognormal(mean_log_length, 1.0, 100_000)
    lengths_N = np.clip(draws, 100, 32768).astype(np.int64)
    rows = rows_of(lengths_N, 32768)
    assert lengths_N.sum() / (len(rows) * 32768) >= 0.999


def test_no_samples_give_no_rows():
    order_N, row_starts_R1 = pack_best_fit([], 8)
    assert order_N.size == 0 and row_starts_R1.tolist() == [0]


def test_unpackable_lengths_are_counted_in_the_error():
    with pytest.raises(ValueError, match="2 of 5 samples exceed capacity=8 and 1 have no tokens"):
        pack_best_fit([9, 8, 100, 0, 1], 8)
    with pytest.raises(ValueError, match="capacity=0"):
        pack_best_fit([], 0)
