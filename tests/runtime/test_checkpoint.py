"""Checkpoints survive full disks, folders that cannot be written, and half-written files."""

import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from safetensors.numpy import save_file

from mindpangu.runtime.checkpoint import (
    list_checkpoints,
    load_optimizer,
    lock_folder,
    newest_checkpoint,
    read_state,
    save_checkpoint,
)
from mindpangu.runtime.cluster import World


def _save(folder, step, size=100):
    def save_model(path):
        (path / "model.bin").write_bytes(b"x" * 10)

    return save_checkpoint(folder, step, save_model, {"m.a": np.zeros(size, np.float32)}, {"best": None}, World())


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_is_named_and_leaves_the_last_checkpoint_intact(small_disk):
    _save(small_disk, 1)
    with pytest.raises(OSError) as error:
        _save(small_disk, 2, size=1_000_000)
    assert "step-000002" in str(error.value) and "The last good checkpoint is" in str(error.value)
    assert "step-000001" in str(error.value)
    assert list(list_checkpoints(small_disk)) == [1]
    assert read_state(newest_checkpoint(small_disk))["step"] == 1
    assert [p.name for p in (small_disk / "checkpoints").iterdir()] == ["step-000001"]
    _save(small_disk, 3)  # with room again, it goes on
    assert list(list_checkpoints(small_disk)) == [1, 3]


def test_a_folder_that_cannot_be_written_is_named(small_disk):
    _save(small_disk, 1)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(OSError, match="cannot save .*step-000002.*Read-only"):
        _save(small_disk, 2)
    with pytest.raises(OSError, match="cannot write to the run folder"):
        lock_folder(small_disk / "run")
    assert read_state(newest_checkpoint(small_disk))["step"] == 1


def test_leftovers_of_a_killed_save_are_no_checkpoint_and_are_removed(tmp_path):
    _save(tmp_path, 1)
    leftover = tmp_path / "checkpoints" / ".writing-step-000002"
    leftover.mkdir()
    (leftover / "state.json").write_text("{}")
    assert newest_checkpoint(tmp_path).name == "step-000001"
    _save(tmp_path, 2)
    assert not leftover.exists() and newest_checkpoint(tmp_path).name == "step-000002"


def test_unreadable_state_and_optimizer_say_what_to_do(tmp_path):
    path = _save(tmp_path, 1)
    file = path / "optimizer-00001-of-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"step-000001: optimizer state unreadable.*delete"):
        load_optimizer(path, {"m.a": 100})
    file.unlink()
    with pytest.raises(ValueError, match="0 of its optimizer files are there"):
        load_optimizer(path, {"m.a": 100})
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | {"format_version": 99}))
    with pytest.raises(ValueError, match="format_version 99, expected 2"):
        read_state(path)
    (path / "state.json").write_text("{")
    with pytest.raises(ValueError, match="not a readable checkpoint state"):
        read_state(path)


@pytest.mark.parametrize("num_written", [1, 2, 3, 4, 7])
def test_the_optimizers_state_is_read_by_any_number_of_ranks(tmp_path, num_written):
    random = np.random.default_rng(num_written)
    whole = {f"m.{size}": random.standard_normal(size).astype(np.float32) for size in (1, 2, 5, 12, 100, 101)}

    def chunks(rank, num_ranks):
        padded = {name: np.pad(array, (0, -array.size % num_ranks)) for name, array in whole.items()}
        return {name: array.reshape(num_ranks, -1)[rank] for name, array in padded.items()}

    folder = tmp_path / "checkpoints" / "step-000001"
    folder.mkdir(parents=True)
    for rank in range(num_written):
        name = f"optimizer-{rank + 1:05d}-of-{num_written:05d}.safetensors"
        save_file(chunks(rank, num_written), folder / name)
    sizes = {name: array.size for name, array in whole.items()}
    for num_ranks in (1, 2, 3, 5, 8):
        for rank in range(num_ranks):
            read, wanted = load_optimizer(folder, sizes, rank, num_ranks), chunks(rank, num_ranks)
            assert all(np.array_equal(read[name], wanted[name]) for name in whole)
    if num_written > 1:
        (folder / f"optimizer-00001-of-{num_written:05d}.safetensors").unlink()
        with pytest.raises(ValueError, match=f"{num_written - 1} of {num_written} optimizer files are there"):
            load_optimizer(folder, sizes)


def test_every_rank_writes_its_own_chunks_and_the_first_the_rest(tmp_path, as_ranks):
    models = []

    def save_model(path):
        models.append(path)
        (path / "model.bin").write_bytes(b"x")

    def save(world):
        return save_checkpoint(tmp_path, 1, save_model, {"m.a": np.full(3, world.rank, np.float32)}, {"best": None},
                               world, (world.rank, 2))

    checkpoint = tmp_path / "checkpoints" / "step-000001"
    for _ in range(2):  # the second time it is there already
        assert as_ranks(2, save) == [checkpoint] * 2
    assert len(models) == 1
    assert sorted(path.name for path in checkpoint.iterdir()) == [
        "model.bin", "optimizer-00001-of-00002.safetensors", "optimizer-00002-of-00002.safetensors", "state.json"]
    assert load_optimizer(checkpoint, {"m.a": 5})["m.a"].tolist() == [0, 0, 0, 1, 1]


def test_a_rank_that_cannot_write_does_not_take_the_folder_from_those_that_do(small_disk, as_ranks):
    is_full, said = threading.Event(), {}

    def save_model(path):
        assert is_full.wait(20)
        (path / "model.bin").write_bytes(b"x")

    def save(world):
        chunks = {"m.a": np.zeros(1_000_000 if world.rank else 1, np.float32)}
        try:
            save_checkpoint(small_disk, 1, save_model, chunks, {"best": None}, world, (world.rank, 2))
        except (OSError, threading.BrokenBarrierError) as error:
            said[world.rank] = str(error)
            is_full.set()
            raise

    with pytest.raises((OSError, threading.BrokenBarrierError)):
        as_ranks(2, save)
    assert "No space left" in said[1] and "No such file" not in said[0]


def test_what_every_rank_has_whole_is_written_once(tmp_path, as_ranks):
    def save(world):
        whole = {"m.a": np.full(5, 7, np.float32)}
        return save_checkpoint(tmp_path, 1, lambda path: None, whole, {"best": None}, world)

    checkpoint = as_ranks(3, save)[0]
    assert len(list(checkpoint.glob("optimizer-*"))) == 1
    assert load_optimizer(checkpoint, {"m.a": 5}, 1, 3)["m.a"].tolist() == [7, 7]


def test_two_runs_in_one_folder_are_refused(tmp_path):
    code = ("import sys, time; from mindpangu.runtime.checkpoint import lock_folder; "
            "lock = lock_folder(sys.argv[1]); print('locked', flush=True); time.sleep(60)")
    other = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match=f"in use by another run \\(process {other.pid}\\)"):
            lock_folder(tmp_path)
    finally:
        other.kill()
        other.wait()
    lock_folder(tmp_path).close()  # a killed run leaves no lock behind
    assert (tmp_path / ".lock").read_text() == str(os.getpid())
