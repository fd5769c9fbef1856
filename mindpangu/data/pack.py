"""Packing: which samples share a row of fixed capacity."""

# N samples, R rows
import numpy as np

_WORD_BITS = 256  # Two levels of small integers: a one-level bitset of 32768 bits costs 4 KiB of copying per lookup.


def pack_best_fit(lengths_N, capacity):
    """Best-fit decreasing over the whole set: the longest sample first, into the fullest row that still takes it.

    lengths_N: tokens per sample, 1 <= length <= capacity. capacity: tokens per row.
    Returns (sample_order_N int64, row_starts_R1 int64): row r holds the samples
    sample_order_N[row_starts_R1[r]:row_starts_R1[r + 1]], longest first. No samples: no rows.
    Raises ValueError if lengths are not positive or exceed the capacity (how many of each).
    Source: Johnson 1973, Near-optimal bin packing algorithms (best-fit decreasing).
    """
    lengths_N = np.asarray(lengths_N, dtype=np.int64).reshape(-1)
    if capacity < 1:
        raise ValueError(f"capacity={capacity}: a row needs room for at least one token.")
    num_long, num_empty = int((lengths_N > capacity).sum()), int((lengths_N <= 0).sum())
    if num_long or num_empty:
        raise ValueError(
            f"{num_long} of {lengths_N.size} samples exceed capacity={capacity} and {num_empty} have no tokens: "
            "every length has to be between 1 and the capacity; drop the others before packing."
        )
    # Samples of one length are alike, so the rows are filled per distinct (length, remaining) pair: `runs` says that
    # the next counts[i] samples, in order of falling length, go into row rows[i].
    order_N = np.argsort(-lengths_N, kind="stable")
    distinct, num_alike = np.unique(-lengths_N, return_counts=True)
    rows, counts, num_rows = [], [], 0
    rows_with = {}  # remaining tokens -> rows that have exactly that much room (full rows are left out)
    words = [0] * (capacity // _WORD_BITS + 1)  # bit b of word w: rows_with has remaining = w * _WORD_BITS + b
    summary = 0  # bit w: words[w] is not zero

    for length, num in zip((-distinct).tolist(), num_alike.tolist(), strict=True):
        count = num  # samples of this length still without a row
        low_word, low_bit = divmod(length, _WORD_BITS)
        while count:
            # The smallest remaining >= length: first in the word of `length`, then in the words above it.
            bits = words[low_word] >> low_bit
            if bits:
                remaining = length + (bits & -bits).bit_length() - 1
            else:
                above = summary >> (low_word + 1)
                if above:
                    word = low_word + (above & -above).bit_length()
                    bits = words[word]
                    remaining = word * _WORD_BITS + (bits & -bits).bit_length() - 1
                else:
                    remaining = 0
            if remaining:
                available = rows_with[remaining]
                per_row = remaining // length
                num_full, rest = divmod(count, per_row)
                if num_full >= len(available):
                    num_full, rest = len(available), 0
                taken = num_full + (rest > 0)
                chosen = available[-taken:]
                del available[-taken:]
                if not available:
                    del rows_with[remaining]
                    word, bit = divmod(remaining, _WORD_BITS)
                    words[word] ^= 1 << bit
                    if not words[word]:
                        summary ^= 1 << word
            else:
                remaining = capacity
                per_row = capacity // length
                num_full, rest = divmod(count, per_row)
                taken = num_full + (rest > 0)
                chosen = list(range(num_rows, num_rows + taken))
                num_rows += taken
            # A row that took one sample stays the fullest that takes the next of the same length: each chosen row is
            # filled with per_row of them before the next one is touched; the last may get the rest only.
            rows += chosen
            counts += [per_row] * num_full
            left = [(remaining - per_row * length, chosen[:num_full])]
            if rest:
                counts.append(rest)
                left.append((remaining - rest * length, chosen[num_full:]))
            for room, group in left:
                if room and group:
                    if room in rows_with:
                        rows_with[room] += group
                    else:
                        rows_with[room] = group
                        word, bit = divmod(room, _WORD_BITS)
                        words[word] |= 1 << bit
                        summary |= 1 << word
            count -= num_full * per_row + rest

    row_of_N = np.repeat(np.array(rows, dtype=np.int64), np.array(counts, dtype=np.int64))
    by_row_N = np.argsort(row_of_N, kind="stable")
    row_starts_R1 = np.zeros(num_rows + 1, dtype=np.int64)
    np.cumsum(np.bincount(row_of_N, minlength=num_rows), out=row_starts_R1[1:])
    return order_N[by_row_N], row_starts_R1
