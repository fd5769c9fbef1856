import errno
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mindpangu.data.shards import ShardFolder, SharedShards, read_shard, write_shard

ROOT = Path(__file__).resolve().parents[2]
BINDING = {"teacher": "aaaa", "tokenizer": "bbbb"}
ARRAYS = {"ids": np.arange(2000, dtype=np.int32), "noise": np.random.default_rng(0).random((5, 3)), "none": np.zeros(0)}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()


def file_bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


DTYPES = st.one_of(st.just(np.bool_), hnp.integer_dtypes(endianness="<"), hnp.floating_dtypes(endianness="<"))
NAMES = st.text(min_size=1, max_size=8).filter(lambda name: name.isprintable())


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(NAMES, hnp.arrays(DTYPES, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0)), max_size=4))
def test_arrays_come_back_bit_for_bit_and_bytes_are_deterministic(arrays):
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder, "a"), Path(folder, "b")
        digest = write_shard(first, arrays)
        assert write_shard(second, dict(reversed(arrays.items()))) == digest
        assert first.read_bytes() == second.read_bytes()
        found = read_shard(first, digest)
        assert_same(found, arrays)
        assert all(array.flags.writeable for array in found.values())
        assert len(list(Path(folder).iterdir())) == 2


def test_compressible_arrays_are_compressed(tmp_path):
    write_shard(tmp_path / "zeros", {"zeros": np.zeros(100_000, np.uint8)})
    assert (tmp_path / "zeros").stat().st_size < 300


def test_any_truncation_or_flipped_bit_is_an_error_that_names_the_file(tmp_path):
    path = tmp_path / "x.shard"
    digest = write_shard(path, ARRAYS)
    good = path.read_bytes()
    for length in [0, 7, 8, 31, len(good) // 2, len(good) - 1]:
        path.write_bytes(good[:length])
        with pytest.raises(ValueError, match=r"x\.shard: .*expected .*delete it and run the command"):
            read_shard(path)
    for position in [0, 9, 20, 40, len(good) // 2, len(good) - 1]:
        path.write_bytes(good[:position] + bytes([good[position] ^ 4]) + good[position + 1 :])
        with pytest.raises(ValueError, match=r"x\.shard: .*expected .*delete it and run the command"):
            read_shard(path)
    write_shard(path, {"ids": ARRAYS["ids"]})
    with pytest.raises(ValueError, match="another shard: checksum .* expected " + digest):
        read_shard(path, digest)


def test_strings_and_objects_are_refused(tmp_path):
    with pytest.raises(ValueError, match="array 'text' has dtype <U1: a shard holds booleans and numbers only"):
        write_shard(tmp_path / "x", {"text": np.array(["a"])})
    assert not list(tmp_path.iterdir())


def test_a_folder_says_what_is_missing_and_reads_in_order(tmp_path):
    folder = ShardFolder.open(tmp_path / "deep" / "er", BINDING, 3)
    assert folder.missing() == [0, 1, 2] and not folder.complete
    folder.write(2, {"n": np.array(2)})
    folder.write(0, {"n": np.array(0)})
    folder = ShardFolder.open(tmp_path / "deep" / "er", BINDING, 3)
    assert folder.missing() == [1] and not folder.complete
    with pytest.raises(ValueError, match=r"00001\.shard: shard 1 of 3 is not written yet"):
        list(folder.read_all())
    folder.write(1, {"n": np.array(1)})
    assert folder.complete and [int(arrays["n"]) for arrays in folder.read_all()] == [0, 1, 2]
    (folder.folder / "00001.shard").unlink()
    assert folder.missing() == [1], "a shard deleted after an error is to be written again"


def test_a_damaged_shard_is_noticed_by_the_folder(tmp_path):
    folder = ShardFolder.open(tmp_path, BINDING, 2)
    folder.write(0, ARRAYS)
    folder.write(1, {"ids": ARRAYS["ids"]})
    good = (tmp_path / "00000.shard").read_bytes()
    (tmp_path / "00000.shard").write_bytes(good[:-3])
    with pytest.raises(ValueError, match=rf"00000\.shard: {len(good) - 3} bytes, expected {len(good)}: delete it"):
        folder.read(0)


def test_other_bindings_are_refused_with_every_difference(tmp_path):
    ShardFolder.open(tmp_path, BINDING, 3)
    (tmp_path / "00000.shard.partial").write_bytes(b"the owner is writing")
    before = file_bytes(tmp_path)
    with pytest.raises(ValueError, match="refuses") as error:
        ShardFolder.open(tmp_path, {"teacher": "cccc", "template": "dddd"}, 4)
    for difference in [
        "teacher differs: manifest aaaa, this run cccc",
        "tokenizer differs: manifest bbbb, this run None",
        "template differs: manifest None, this run dddd",
        "num_shards differs: manifest 3, this run 4",
    ]:
        assert difference in str(error.value)
    assert file_bytes(tmp_path) == before


@pytest.mark.parametrize("text", ["", "{", "[]", '{"binding": {}}'])
def test_a_broken_manifest_is_named(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json: not a manifest"):
        ShardFolder.open(tmp_path, BINDING, 3)


def test_leftovers_of_a_killed_writer_are_removed(tmp_path):
    (tmp_path / "00001.shard.partial").write_bytes(b"half")
    folder = ShardFolder.open(tmp_path, BINDING, 3)  # a reader leaves what may be another process's work alone
    assert (tmp_path / "00001.shard.partial").exists()
    folder.write(0, {"a": np.arange(3)})
    assert sorted(file_bytes(tmp_path)) == ["00000.shard", "manifest.json"]


WRITER = """
import sys
import numpy as np
from mindpangu.data.shards import ShardFolder
folder = ShardFolder.open(sys.argv[1], {"teacher": "aaaa"}, 30)
print("started", flush=True)
for i in folder.missing():
    rng = np.random.default_rng(i)
    folder.write(i, {"noise": rng.random(40_000), "ids": rng.integers(0, 9, 40_000)})
"""


def test_sigkill_at_any_time_and_a_rerun_give_the_bytes_of_an_uninterrupted_run(tmp_path):
    def start(folder):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", WRITER, str(folder)]
        writer = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
        assert writer.stdout.readline() == b"started\n"
        return writer, time.perf_counter()

    writer, began = start(tmp_path / "whole")
    assert writer.wait(60) == 0
    duration_s = time.perf_counter() - began
    expected = file_bytes(tmp_path / "whole")
    assert len(expected) == 31
    random_point = random.Random(0)
    num_killed = num_inside = 0
    for trial in range(4):
        folder = tmp_path / f"killed{trial}"
        # Two kills each: the second meets a folder that is resumed.
        for _ in range(2):
            writer, _ = start(folder)
            time.sleep(random_point.uniform(0.02, 0.6) * duration_s)
            writer.send_signal(signal.SIGKILL)
            num_killed += writer.wait(60) == -signal.SIGKILL
            recorded = json.loads((folder / "manifest.json").read_bytes())["shards"]
            for i, entry in recorded.items():
                assert (folder / f"{int(i):05d}.shard").stat().st_size == entry["bytes"]
            num_inside += 0 < len(recorded) < 30
        writer, _ = start(folder)
        assert writer.wait(60) == 0
        assert file_bytes(folder) == expected
    assert num_killed >= 4 and num_inside >= 2, "the kills have to hit the middle of the work"


def test_a_full_disk_names_the_path_and_keeps_the_finished_shards(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("mounting a small tmpfs is not permitted here")
    try:
        folder = ShardFolder.open(tmp_path, BINDING, 3)
        noise = {"noise": np.random.default_rng(0).random(50_000)}
        folder.write(0, noise)
        with pytest.raises(OSError, match=r"No space left on device .*00001\.shard") as error:
            folder.write(1, {"noise": np.random.default_rng(1).random(200_000)})
        assert error.value.errno == errno.ENOSPC
        assert sorted(file_bytes(tmp_path)) == ["00000.shard", "manifest.json"]
        folder = ShardFolder.open(tmp_path, BINDING, 3)
        assert folder.missing() == [1, 2]
        assert_same(folder.read(0), noise)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_folder_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match=r"Permission denied .*manifest\.json"):
        ShardFolder.open(tmp_path, BINDING, 3)


@pytest.mark.parametrize(("num_shards", "num_ranks"), [(1, 2), (5, 2), (4, 4), (7, 3)])
def test_ranks_write_the_missing_shards_side_by_side_to_the_same_bytes(tmp_path, as_ranks, num_shards, num_ranks):
    def arrays(i):
        return {"x": np.arange(i + 3)}

    alone = ShardFolder.open(tmp_path / "alone", {"a": "b"}, num_shards)
    for i in range(num_shards):
        alone.write(i, arrays(i))
    folder = tmp_path / "shared"
    ShardFolder.open(folder, {"a": "b"}, num_shards).write(0, arrays(0))
    written = []

    def fill(world):
        shards = ShardFolder.open(folder, {"a": "b"}, num_shards)
        shared = SharedShards(shards, world)
        for i in shared.missing():
            written.append(i)
            shared.write(i, arrays(i))
        shared.finish()
        assert shards.complete and [len(part["x"]) for part in shards.read_all()] == [i + 3 for i in range(num_shards)]
        return (folder / "manifest.json").read_bytes()

    manifests = as_ranks(num_ranks, fill)
    assert sorted(written) == list(range(1, num_shards))
    assert set(manifests) == {(tmp_path / "alone" / "manifest.json").read_bytes()}


def test_what_ranks_have_written_is_kept_when_one_is_lost(tmp_path, as_ranks):
    ShardFolder.open(tmp_path, {}, 6)
    lost = RuntimeError("lost")

    def fill(world):
        shared = SharedShards(ShardFolder.open(tmp_path, {}, 6), world)
        for i in shared.missing():
            if i == 3:
                raise lost
            shared.write(i, {"x": np.zeros(i)})

    with pytest.raises((RuntimeError, threading.BrokenBarrierError)):
        as_ranks(2, fill)
    assert ShardFolder.open(tmp_path, {}, 6).missing() == [2, 3, 4, 5]
