"""Checkpoints survive full disks, folders that cannot be written, and half-written files."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from mindpangu.runtime.checkpoint import (
    list_checkpoints,
    load_optimizer,
    lock_folder,
    newest_checkpoint,
    read_state,
    save_checkpoint,
)


def _save(folder, step, size=100):
    def save_model(path):
        (path / "model.bin").write_bytes(b"x" * 10)

    return save_checkpoint(folder, step, save_model, {"m.a": np.zeros(size, np.float32)}, {"best": None})


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
    (path / "optimizer.safetensors").write_bytes((path / "optimizer.safetensors").read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"optimizer.safetensors: unreadable.*delete"):
        load_optimizer(path, [])
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | {"format_version": 99}))
    with pytest.raises(ValueError, match="format_version 99, expected 1"):
        read_state(path)
    (path / "state.json").write_text("{")
    with pytest.raises(ValueError, match="not a readable checkpoint state"):
        read_state(path)


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
