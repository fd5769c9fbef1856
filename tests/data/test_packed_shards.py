"""Packed rows on disk: each sample once an epoch, in the order it was given, whoever reads and whatever was killed."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mindpangu.data.packed_shards import MemoryShards, PackedShards, ShardBatches, write_packed

PAD = 999_999
BINDING = {"tokenizer": "aaaa", "template": "bbbb", "data": "cccc"}
SETTINGS = {"seq_len": 32, "rows_per_step": 4, "micro_batch_rows": 2, "pad_id": PAD, "seed": 3}


def tokenize(first, end):
    """Sample i: tokens i * 100 + position, 2 to 40 of them (some over seq_len=32), the second half supervised."""
    tokenized = []
    for i in range(first, end):
        length = int(np.random.default_rng(i).integers(2, 41))
        tokenized.append((i * 100 + np.arange(length, dtype=np.int32), np.arange(length) >= (length + 1) // 2))
    return tokenized


def slow_tokenize(first, end):
    time.sleep(0.05)
    return tokenize(first, end)


def write(folder, **changes):
    return write_packed(folder, 200, tokenize, **{"seq_len": 32, "pad_id": PAD, "samples_per_shard": 40,
                                                 "binding": BINDING, **changes})


def documents(batch):
    """(sample, is whole) of every document of a batch that is no padding, micro-batch after micro-batch."""
    for micro, ends in enumerate(batch.cu_seqlens_AC):
        targets = dict(zip(batch.target_index_AS[micro], batch.labels_AS[micro], strict=True))
        used = int(batch.loss_weights_AS[micro].sum())
        assert sum(weight > 0 for weight in batch.loss_weights_AS[micro]) == used
        for start, end in itertools.pairwise(ends.tolist()):
            tokens = batch.tokens_AT[micro, start:end]
            if start == end or tokens[0] == PAD:
                continue
            sample = int(tokens[0]) // 100
            [(whole, is_target)] = tokenize(sample, sample + 1)
            found = [targets.get(place - 1) == batch.tokens_AT[micro, place] for place in range(start, end)]
            yield sample, tokens.tolist() == whole.tolist() and found == is_target.tolist()


FITTING = [i for i in range(200) if len(tokenize(i, i + 1)[0][0]) <= 32]


def test_every_sample_comes_whole_once_an_epoch_in_the_order_of_its_shard(tmp_path):
    shards = write(tmp_path / "packed")
    batches = ShardBatches(shards, **SETTINGS)
    assert batches.num_samples == len(FITTING) and batches.num_dropped == 200 - len(FITTING)
    total = sum(len(tokens) for i in FITTING for tokens, _ in tokenize(i, i + 1))
    assert batches.fill == total / (32 * batches.num_rows)
    first = list(itertools.islice(batches, batches.num_rows))  # 4 rows a step: four whole epochs
    assert len({tuple(array.shape for array in batch.arrays()) for batch in first}) == 1, "one compiled graph"
    seen = [document for batch in first for document in documents(batch)]
    assert all(is_whole for _, is_whole in seen)
    order = [sample for sample, _ in seen]
    epochs = [order[i * len(FITTING):(i + 1) * len(FITTING)] for i in range(4)]
    for epoch in epochs:
        assert sorted(epoch) == FITTING
        assert [sample // 40 for sample in epoch] == sorted(sample // 40 for sample in epoch), "shard after shard"
    assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0]), "shuffled within a shard, anew in each epoch"
    memory = ShardBatches(MemoryShards(tokenize(0, 200), seq_len=32, samples_per_shard=40), **SETTINGS)
    for batch, same in zip(first, memory, strict=False):
        assert [a.tobytes() for a in batch.arrays()] == [a.tobytes() for a in same.arrays()]


def test_only_one_shard_is_held_and_each_is_read_once_an_epoch(tmp_path):
    shards = write(tmp_path / "packed")
    reads, read = [], shards.read
    shards.read = lambda i: reads.append(i) or read(i)
    batches = ShardBatches(shards, **SETTINGS)
    for _ in range(batches.num_rows // 4):
        next(batches)
    assert reads in ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 0])


def test_rows_are_full_where_shards_are_large():
    lengths = np.random.default_rng(0).integers(2, 3000, 4000)
    tokenized = [(np.zeros(n, np.int32), np.arange(n) > 0) for n in lengths]
    [counts] = MemoryShards(tokenized, seq_len=4096, samples_per_shard=4000).counts
    assert counts.rows == -(-int(lengths.sum()) // 4096)


def test_long_documents_are_split_into_pieces_that_predict_nothing_across_a_cut(tmp_path):
    # 40 tokens, all supervised but the first: pieces of 32 and 8; of 33 tokens the last one is alone.
    def text(first, end):
        return [(np.arange(n, dtype=np.int32), np.arange(n) > 0) for n in (40, 33)[first:end]]

    shards = write_packed(tmp_path, 2, text, seq_len=32, pad_id=PAD, samples_per_shard=2, binding=BINDING,
                          on_long="split")
    arrays = shards.read(0)
    assert arrays["lengths"].tolist() == [32, 32, 8] and arrays["row_samples"].tolist() == [1, 1, 1]
    assert np.flatnonzero(~arrays["is_target"]).tolist() == [0, 32, 64] and shards.counts[0].dropped == 0
    assert arrays["tokens"].tolist() == [*range(32), *range(32), *range(32, 40)]


def test_resuming_at_any_step_and_the_shares_of_ranks_give_the_same_batches(tmp_path):
    shards = write(tmp_path)

    def same(batch, other):
        return all(a.tobytes() == b.tobytes() for a, b in zip(batch, other, strict=True))

    batches = ShardBatches(shards, **SETTINGS)
    num_steps = 2 * batches.steps_per_epoch + 1
    states, expected = [batches.state_dict()], []
    for _ in range(num_steps):
        expected.append(next(batches).arrays())
        states.append(batches.state_dict())
    for stop in range(0, num_steps, 7):
        resumed = ShardBatches(shards, **SETTINGS)
        resumed.load_state_dict(states[stop])
        assert all(same(next(resumed).arrays(), batch) for batch in expected[stop:])
    shares = [ShardBatches(shards, **SETTINGS, share=(i, 2)) for i in range(2)]
    for batch in expected:
        parts = [next(share).arrays() for share in shares]
        assert same(batch, [np.concatenate(pair) for pair in zip(*parts, strict=True)])
    with pytest.raises(ValueError, match="does not fit"):
        ShardBatches(shards, **SETTINGS | {"rows_per_step": 2}).load_state_dict(states[1])


def test_a_killed_writer_ends_in_the_same_bytes_and_leaves_no_process(tmp_path):
    def contents(folder):
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    write(tmp_path / "whole", samples_per_shard=10)
    code = (f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_packed_shards as t\n"
            "if __name__ == '__main__':\n"
            f"    t.write_packed({str(tmp_path / 'parts')!r}, 200, t.slow_tokenize, seq_len=32, pad_id=t.PAD, "
            "samples_per_shard=10, binding=t.BINDING, num_processes=2)\n")
    (tmp_path / "write.py").write_text(code)
    process = subprocess.Popen([sys.executable, tmp_path / "write.py"], start_new_session=True)
    while not (tmp_path / "parts" / "00003.shard").exists():
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with pytest.raises(ValueError, match=r"of 20 shards are missing, the first \d+: run the command"):
        PackedShards(tmp_path / "parts")
    deadline = time.monotonic() + 20
    while _session(process.pid):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.02)
    done = [path.name for path in (tmp_path / "parts").glob("*.shard")]
    ages = {name: (tmp_path / "parts" / name).stat().st_mtime_ns for name in done}
    steps = []
    write(tmp_path / "parts", samples_per_shard=10, on_progress=lambda *step: steps.append(step))
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert steps[-1] == (20, 20) and len(steps) <= 20 - len(done) + 1
    assert sum((tmp_path / "parts" / name).stat().st_mtime_ns == ages[name] for name in done) >= len(done) - 1


def _session(leader):
    """Processes of a session that are alive."""
    alive = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(session) == leader and state != "Z":
            alive.append(stat)
    return alive


def test_what_cannot_be_written_or_read_is_named(tmp_path):
    shards = write(tmp_path / "packed")
    good = {"tokenizer": "aaaa", "template": "bbbb", "seq_len": 32, "pad_id": PAD}
    shards.check(**good)
    for change, words in (({"tokenizer": "ffff"}, "tokenizer aaaa, this run ffff: their ids would mean other tokens"),
                          ({"seq_len": 64}, "seq_len 32, this run 64: set data.seq_len=32"),
                          ({"template": "ffff"}, "template bbbb"), ({"pad_id": 0}, "pad_id 999999, this run 0")):
        with pytest.raises(ValueError, match=words):
            shards.check(**good | change)
    with pytest.raises(ValueError, match="data differs: manifest cccc, this run dddd"):
        write(tmp_path / "packed", binding={**BINDING, "data": "dddd"})
    with pytest.raises(ValueError, match=r"no folder of shards: manifest\.json is missing"):
        PackedShards(tmp_path)
    with pytest.raises(ValueError, match="sample 41 of 3 tokens: expected at least one supervised token"):
        write_packed(tmp_path / "bare", 50, lambda first, end: [
            (np.arange(3), [False, False, i != 41]) for i in range(first, end)], seq_len=32, pad_id=PAD,
            samples_per_shard=40, binding=BINDING)
    with pytest.raises(ValueError, match="data.seq_len=2: all 200 samples are longer"):
        ShardBatches(MemoryShards([(np.arange(3), [False, True, True])] * 200, seq_len=2, samples_per_shard=50),
                     **SETTINGS | {"seq_len": 2})
