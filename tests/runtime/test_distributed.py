"""What ranks share, without a second process; tests/test_distributed.py has the jobs."""

from types import SimpleNamespace

import numpy as np
import pytest

from mindpangu.config import load_recipe
from mindpangu.data.batches import tokenized_to_samples
from mindpangu.pipeline import _pack
from mindpangu.runtime.cluster import World
from mindpangu.runtime.distributed import Ranks, chunk_of


@pytest.mark.parametrize(("size", "sequence_parallel", "expected"), [
    (1, 1, [(0, 0)]),
    (4, 1, [(0, 0), (1, 0), (2, 0), (3, 0)]),
    (6, 3, [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]),
])
def test_consecutive_ranks_share_a_sequence(size, sequence_parallel, expected):
    ranks = [Ranks(World(rank, size), sequence_parallel) for rank in range(size)]
    assert [(r.data_rank, r.sequence_rank) for r in ranks] == expected
    assert {(r.num_data, r.num_sequence) for r in ranks} == {(size // sequence_parallel, sequence_parallel)}


def test_ranks_that_cannot_share_sequences_are_refused():
    with pytest.raises(ValueError, match="run.sequence_parallel=2 with 3 ranks: expected a divisor"):
        Ranks(World(0, 3), 2)


def test_micro_batches_divide_the_rows_of_their_ranks():
    samples = tokenized_to_samples([(np.full(60, 5), np.arange(60) > 0)] * 20)

    def pack(rows_per_step, micro_batch_rows):
        recipe = load_recipe(["recipe=sft_direct", "scale=smoke", "model.num_kv_heads=2", "data.seq_len=99",
                              f"train.rows_per_step={rows_per_step}", f"train.micro_batch_rows={micro_batch_rows}",
                              "run.sequence_parallel=2"])
        return _pack(SimpleNamespace(recipe=recipe, ranks=Ranks(World(0, 4), 2)), samples, 0)

    assert pack(12, 4).micro_batch_rows == 3  # of the 6 rows of a rank 1, 2 or 3
    assert pack(12, 2).micro_batch_rows == 2
    assert pack(20, 4).micro_batch_rows == 2


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5, 8])
def test_chunks_are_equal_and_hold_everything_once(num_ranks):
    for size in (1, 2, 7, 8, 40):
        array = np.arange(1, size + 1, dtype=np.float32)
        chunks = [chunk_of(array.reshape(1, -1), rank, num_ranks) for rank in range(num_ranks)]
        assert len({chunk.shape for chunk in chunks}) == 1
        joined = np.concatenate(chunks)
        np.testing.assert_array_equal(joined[:size], array)
        assert not joined[size:].any() and joined.size < size + num_ranks


def test_every_rank_shows_its_throughput_and_memory(as_ranks):
    def measure(world):
        own = {"tokens_per_s": 100.0, "data_wait": 0.1 * world.rank, "memory_gib": 2.0 + world.rank}
        return Ranks(world).measure(own)

    first, second = as_ranks(2, measure)
    assert first == second == {
        "rank/0/tokens_per_s": 50.0, "rank/0/data_wait": 0.0, "rank/0/memory_gib": 2.0,
        "rank/1/tokens_per_s": 50.0, "rank/1/data_wait": 0.1, "rank/1/memory_gib": 3.0, "memory_gib": 3.0}
    assert Ranks().measure({}) == {}
