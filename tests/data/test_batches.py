import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindpangu.data.batches import (
    PackedBatches,
    PackedRows,
    Samples,
    SequenceShare,
    documents_to_samples,
    split_sequence,
    tokenized_to_samples,
)

PAD = 999_999
SETTINGS = {"seq_len": 16, "rows_per_step": 4, "micro_batch_rows": 2, "pad_id": PAD, "seed": 7}


def make_samples(lengths, seed=0):
    """Tokens sample * 1000 + position, so that every token says where it came from; about half are targets."""
    rng = np.random.default_rng(seed)
    tokenized = []
    for sample, length in enumerate(lengths):
        is_target_T = rng.random(length) < 0.5
        is_target_T[-1] = True
        is_target_T[0] = False
        tokenized.append((sample * 1000 + np.arange(length), is_target_T))
    labels = np.concatenate([tokens_T[is_target_T] for tokens_T, is_target_T in tokenized])
    extras = {"teacher_ids": np.stack([labels, labels + 1], 1), "a_logprob": labels.astype(np.float32)}
    return tokenized, tokenized_to_samples(tokenized, extras)


def same(batch, other):
    pairs = zip(batch.arrays(), other.arrays(), strict=True)
    return all(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in pairs)


@settings(deadline=None, max_examples=100)
@given(
    lengths=st.lists(st.integers(2, 20), min_size=1, max_size=60),
    num_micro=st.integers(1, 3),
    micro_batch_rows=st.integers(1, 4),
)
def test_every_document_of_every_batch_is_a_whole_sample_or_padding(lengths, num_micro, micro_batch_rows):
    if min(lengths) > 16:
        lengths = [*lengths, 5]
    tokenized, samples = make_samples(lengths)
    rows_per_step = num_micro * micro_batch_rows
    settings = SETTINGS | {"rows_per_step": rows_per_step, "micro_batch_rows": micro_batch_rows}
    batches = PackedBatches(samples, **settings)
    num_tokens = micro_batch_rows * 16
    assert batches.num_dropped == sum(length > 16 for length in lengths)
    assert batches.num_samples == len(lengths) - batches.num_dropped
    assert batches.S % 8 == 0
    seen = []
    num_steps = batches.num_rows  # whole epochs: every row is seen rows_per_step times
    for batch in itertools.islice(batches, num_steps):
        assert [a.dtype for a in batch.arrays()[:6]] == [np.int32, np.int32, np.int64, np.int32, np.int32, np.float32]
        assert batch.tokens_AT.shape == (num_micro, num_tokens)
        assert batch.cu_seqlens_AC.shape == (num_micro, batches.C)
        a_logprob_AS, teacher_ids_AS2 = batch.extras  # sorted by name
        for micro in range(num_micro):
            ends = batch.cu_seqlens_AC[micro]
            assert ends[0] == 0 and ends[-1] == num_tokens and (np.diff(ends) >= 0).all()
            last_real = np.flatnonzero(ends == num_tokens)[0]
            assert (np.diff(ends[: last_real + 1]) > 0).all()
            expected = []
            for start, end in itertools.pairwise(ends[: last_real + 1].tolist()):
                assert start // 16 == (end - 1) // 16, "a document crosses a row boundary"
                document = batch.tokens_AT[micro, start:end]
                assert batch.positions_AT[micro, start:end].tolist() == list(range(end - start))
                if document[0] == PAD:
                    assert (document == PAD).all() and end % 16 == 0
                    continue
                sample = int(document[0]) // 1000
                tokens_T, is_target_T = tokenized[sample]
                assert document.tolist() == tokens_T.tolist()
                seen.append(sample)
                expected += [(start + t - 1, int(tokens_T[t])) for t in np.flatnonzero(is_target_T)]
            used = batch.loss_weights_AS[micro] == 1
            assert used.sum() == len(expected) and used[: len(expected)].all()
            assert (batch.loss_weights_AS[micro, ~used] == 0).all()
            found = zip(batch.target_index_AS[micro, used].tolist(), batch.labels_AS[micro, used].tolist(), strict=True)
            assert list(found) == expected
            labels = batch.labels_AS[micro]
            assert np.array_equal(teacher_ids_AS2[micro, used], np.stack([labels, labels + 1], 1)[used])
            assert np.array_equal(a_logprob_AS[micro, used], labels[used].astype(np.float32))
            assert not teacher_ids_AS2[micro, ~used].any() and not batch.target_index_AS[micro, ~used].any()
    fitting = [n for n, length in enumerate(lengths) if length <= 16]
    assert sorted(seen) == sorted(fitting * rows_per_step)


def test_counts_match_a_hand_worked_data_set():
    # Packed at 16: [10, 6] full; [9, 4] + 3 padding. Targets: every token but the first.
    batches = PackedBatches(documents_to_samples([np.arange(n) for n in (10, 6, 9, 4)], 16), **SETTINGS)
    assert (batches.num_rows, batches.num_samples, batches.num_targets) == (2, 4, 9 + 5 + 8 + 3)
    assert batches.fill == (16 + 13) / 32
    assert batches.C == 1 + 2 + 3
    assert batches.S == 32  # 25 targets, rounded up to a multiple of 8
    assert batches.steps_per_epoch == 1


def test_each_epoch_is_another_order_of_all_rows_given_by_the_seed():
    _, samples = make_samples([16] * 40)

    def orders(seed):
        batches = PackedBatches(samples, **(SETTINGS | {"seed": seed}))
        firsts = [batch.tokens_AT[:, ::16].ravel() // 1000 for batch in itertools.islice(batches, 20)]
        return np.concatenate(firsts).reshape(2, 40).tolist()

    first, second = orders(7)
    assert sorted(first) == sorted(second) == list(range(40))
    assert first != second and first != sorted(first)
    assert orders(7) == [first, second] and orders(8)[0] != first


@pytest.mark.parametrize("num_rows", [1, 3, 4, 8, 11])
def test_resuming_at_any_step_repeats_the_same_batches_bit_for_bit(num_rows):
    # 4 rows per step: 8 rows end epochs with steps, 11 inside one, 1 and 3 rows repeat within one step.
    _, samples = make_samples([16] * num_rows)
    batches = PackedBatches(samples, **SETTINGS)
    states, expected = [batches.state_dict()], []
    for _ in range(10):
        expected.append(next(batches))
        states.append(batches.state_dict())
    assert all(type(value) is int for state in states for value in state.values())
    assert all(state.keys() == {"epoch", "row", "step"} for state in states)
    for stop in range(10):
        resumed = PackedBatches(samples, **SETTINGS)
        resumed.load_state_dict(states[stop])
        assert all(same(next(resumed), batch) for batch in expected[stop:])
        assert resumed.state_dict() == states[-1]


def test_a_position_of_another_data_set_is_refused():
    batches = PackedBatches(make_samples([16] * 8)[1], **SETTINGS)
    next(batches)
    state = batches.state_dict()
    for num_rows, rows_per_step in [(3, 4), (8, 2)]:
        other = PackedBatches(make_samples([16] * num_rows)[1], **(SETTINGS | {"rows_per_step": rows_per_step}))
        with pytest.raises(ValueError, match="row=4 step=1 does not fit"):
            other.load_state_dict(state)


def test_fixed_document_count_keeps_the_shape_and_must_suffice():
    samples = make_samples([8] * 8)[1]
    assert PackedBatches(samples, **SETTINGS).C == 1 + 4
    assert PackedBatches(samples, **SETTINGS, max_documents=9).C == 10
    with pytest.raises(ValueError, match="max_documents=3: a micro-batch of this data set has up to 4"):
        PackedBatches(samples, **SETTINGS, max_documents=3)


def test_long_documents_are_cut_for_pretraining_and_predict_nothing_across_the_cut():
    samples = documents_to_samples([np.arange(10), [], [5], np.arange(20, 29)], 4)
    assert samples.tokens.tolist() == [*range(10), *range(20, 28)]  # the ninth token of the last document is alone
    assert samples.offsets.tolist() == [0, 4, 8, 10, 14, 18]
    assert np.flatnonzero(~samples.is_target).tolist() == [0, 4, 8, 10, 14]


def test_100k_samples_make_full_rows():
    lengths_N = np.clip(np.random.default_rng(0).lognormal(6.5, 1.0, 100_000), 100, 32768).astype(np.int64) // 8
    offsets = np.concatenate([[0], np.cumsum(lengths_N)])
    is_target = np.ones(offsets[-1], bool)
    is_target[offsets[:-1]] = False
    samples = Samples(np.ones(offsets[-1], np.int32), offsets, is_target, {})
    batches = PackedBatches(samples, **(SETTINGS | {"seq_len": 4096, "rows_per_step": 512}))
    assert batches.fill > 0.999
    # A random step holds the fill of the whole set up to the few loose rows at the end of packing.
    assert (next(batches).tokens_AT == 1).mean() > 0.995


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows_per_step": 3}, "rows_per_step=3, micro_batch_rows=2"),
        ({"micro_batch_rows": 0}, "micro_batch_rows=0"),
        ({"seq_len": 3}, r"data.seq_len=3: 2 of 2 samples are longer.* 9 tokens; raise data.seq_len"),
        ({"seq_len": 8, "on_long": "raise"}, "data.seq_len=8: 1 of 2 samples are longer"),
        ({"on_long": "cut"}, "on_long='cut': expected 'drop' or 'raise'"),
    ],
)
def test_impossible_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        PackedBatches(make_samples([9, 4])[1], **(SETTINGS | change))


def test_unusable_data_is_named():
    def packed(tokenized, extras=None):
        return PackedBatches(tokenized_to_samples(tokenized, extras), **SETTINGS)

    good = ([1, 2], [False, True])
    with pytest.raises(ValueError, match="data set is empty"):
        packed([])
    with pytest.raises(ValueError, match="samples 1 have no tokens"):
        packed([good, ([], [])])
    with pytest.raises(ValueError, match="samples 1 have their first token as a target"):
        packed([good, ([1, 2], [True, True])])
    with pytest.raises(ValueError, match="1 of 2 rows have no supervised token; the first holds the samples 0:"):
        packed([([1] * 16, [False] * 16), good])
    with pytest.raises(ValueError, match="extra 'logprob' has 2 rows, the data set has 1 targets"):
        packed([good], {"logprob": np.zeros(2)})


@settings(deadline=None, max_examples=100)
@given(lengths=st.lists(st.integers(2, 16), min_size=1, max_size=30), micro_batch_rows=st.integers(1, 5),
       seed=st.integers(0, 99))
def test_packed_rows_assemble_every_target_once_beside_empty_rows(lengths, micro_batch_rows, seed):
    """All rows in any order, filled up with empty ones anywhere: each target stands once, with its own extra."""
    _, samples = make_samples(lengths, seed)
    num_targets = int(samples.is_target.sum())
    samples = samples._replace(extras={"slot": np.arange(num_targets)})
    packed = PackedRows(samples, seq_len=16, micro_batch_rows=micro_batch_rows, pad_id=PAD)
    num_micro = -(-packed.num_rows // micro_batch_rows) + 1
    rows = np.full(num_micro * micro_batch_rows, -1)
    rows[:packed.num_rows] = np.arange(packed.num_rows)
    batch = packed.assemble(np.random.default_rng(seed).permutation(rows).reshape(num_micro, micro_batch_rows))
    used = batch.loss_weights_AS == 1
    [slots] = batch.extras
    assert sorted(slots[used].tolist()) == list(range(num_targets))
    assert (samples.tokens[samples.is_target][slots[used]] == batch.labels_AS[used]).all()
    assert (np.diff(batch.cu_seqlens_AC, axis=1) >= 0).all()
    assert (batch.cu_seqlens_AC[:, -1] == micro_batch_rows * 16).all()
    tokens = sum(int((batch.tokens_AT[micro] != PAD).sum()) for micro in range(num_micro))
    assert tokens == len(samples.tokens)


def test_packed_rows_keep_the_shapes_they_are_given():
    for lengths in ([3, 5, 9], [16, 16, 4, 2, 2]):
        _, samples = make_samples(lengths)
        packed = PackedRows(samples, seq_len=16, micro_batch_rows=2, pad_id=PAD, max_documents=9, max_targets=32)
        batch = packed.assemble(np.array([[0, -1]]))
        assert batch.cu_seqlens_AC.shape == (1, 10) and batch.labels_AS.shape == (1, 32)
    with pytest.raises(ValueError, match="max_targets=1: a micro-batch of this data set has up to .*raise max_targets"):
        PackedRows(samples, seq_len=16, micro_batch_rows=2, pad_id=PAD, max_targets=1)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_the_shares_of_all_ranks_are_the_batch(num_ranks):
    samples = tokenized_to_samples([(np.arange(n, dtype=np.int32), np.arange(n) > n // 2) for n in range(3, 30)])
    settings_ = {"seq_len": 32, "rows_per_step": 8, "micro_batch_rows": 2, "pad_id": 0, "seed": 4}
    whole = PackedBatches(samples, **settings_)
    shares = [PackedBatches(samples, **settings_, share=(i, num_ranks)) for i in range(num_ranks)]
    for _ in range(5):
        batch, parts = next(whole), [next(share) for share in shares]
        for array, *pieces in zip(batch.arrays(), *(part.arrays() for part in parts), strict=True):
            joined = np.stack(pieces, 1).reshape(array.shape)  # micro-batch i belongs to rank i % num_ranks
            np.testing.assert_array_equal(joined, array)
        assert sum(part.num_tokens for part in parts) == batch.num_tokens
    assert all(share.state_dict() == whole.state_dict() for share in shares)
    with pytest.raises(ValueError, match="micro_batch_rows times 3 ranks"):
        PackedBatches(samples, **settings_, share=(0, 3))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 2, 3, 6]), st.integers(24, 29))
def test_shares_of_a_sequence_hold_every_token_and_target_once(seed, num_parts, seq_len):
    random = np.random.default_rng(seed)
    lengths = random.integers(2, 24, random.integers(1, 20))
    is_target = [np.append(False, random.random(n - 1) < random.random()) for n in lengths]
    is_target[0][-1] = True
    samples = tokenized_to_samples([(random.integers(1, 99, n).astype(np.int32), flags)
                                    for n, flags in zip(lengths, is_target, strict=True)],
                                   {"extra": random.random((int(sum(map(np.sum, is_target))), 3)).astype(np.float32)})
    rows = PackedRows(samples, seq_len=seq_len, micro_batch_rows=2, pad_id=0)
    numbers = np.pad(np.arange(rows.num_rows), (0, rows.num_rows % 2), constant_values=-1)
    batch = rows.assemble(numbers.reshape(-1, 2))
    parts = [split_sequence(batch.arrays(), part, num_parts) for part in range(num_parts)]
    share = -(-2 * seq_len // num_parts)
    for i, whole in enumerate((batch.tokens_AT, batch.positions_AT)):
        joined = np.concatenate([part[i] for part in parts], 1)
        np.testing.assert_array_equal(joined[:, :2 * seq_len], whole)
        assert joined.shape[1] == share * num_parts and not joined[:, 2 * seq_len:].any()
    assert len({tuple(array.shape for array in part) for part in parts}) == 1, "one compiled graph for all ranks"
    for micro in range(len(batch.tokens_AT)):
        found = []
        for number, (_, _, cu_seqlens, index, labels, weights, extra) in enumerate(parts):
            np.testing.assert_array_equal(cu_seqlens[micro], batch.cu_seqlens_AC[micro])
            used = weights[micro] > 0
            assert (index[micro] >= 0).all() and (index[micro] < share).all()
            assert not index[micro][~used].any() and not labels[micro][~used].any() and not extra[micro][~used].any()
            found += zip((index[micro][used] + number * share).tolist(), labels[micro][used].tolist(),
                         extra[micro][used].tolist(), strict=True)
        used = batch.loss_weights_AS[micro] > 0
        assert found == list(zip(batch.target_index_AS[micro][used].tolist(), batch.labels_AS[micro][used].tolist(),
                                 batch.extras[0][micro][used].tolist(), strict=True))


def test_batches_of_a_share_of_the_tokens_keep_their_place():
    samples = tokenized_to_samples([(np.arange(n, dtype=np.int32), np.arange(n) > 1) for n in range(3, 30)])
    batches = PackedBatches(samples, seq_len=32, rows_per_step=4, micro_batch_rows=2, pad_id=0, seed=4)
    share = SequenceShare(batches, 1, 2)
    first, place = next(share), share.state_dict()
    second = next(share)
    share.load_state_dict(place)
    for again, once in zip(next(share).arrays(), second.arrays(), strict=True):
        np.testing.assert_array_equal(again, once)
    assert (first.num_micro_batches, first.num_tokens, first.arrays()[0].shape) == (2, 128, (2, 32))
