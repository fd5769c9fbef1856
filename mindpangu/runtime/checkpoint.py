"""Checkpoints: a folder per step, complete or absent. Also the run folder's lock. Knows no model.

    checkpoints/step-000300/    what save_model writes, optimizer.safetensors, state.json
    checkpoints/best            a link to the step with the best validation
"""

import fcntl
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

FORMAT_VERSION = 1
_STEP = re.compile(r"step-(\d+)$")


def fsync_folder(folder):
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path, text):
    """Replace a small text file in one step: the old content or the new one, never a part."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.writing")
    with open(aside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    fsync_folder(path.parent)


def find_model(path):
    """The folder with the weights that a run, checkpoint or Hugging Face folder means. Raises ValueError if none is."""
    path = Path(path)
    folder = path if (path / "config.json").is_file() else newest_checkpoint(path)
    if folder is None or not (folder / "tokenizer.model").is_file():
        raise ValueError(f"{path}: expected a run folder with a checkpoint, or a folder with config.json, weights and "
                         "tokenizer.model.")
    return folder


def lock_folder(folder):
    """Keep other runs out of a folder while the returned file is open. Raises ValueError if it is taken."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 - closing it gives up the lock
    except OSError as error:
        raise OSError(error.errno, f"cannot write to the run folder {folder} ({error.strerror}): "
                                   "choose another run.root or run.dir") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        owner = file.read().strip() or "unknown"
        file.close()
        raise ValueError(f"{folder} is in use by another run (process {owner}): wait for it, stop it, or choose "
                         "another run.dir or run.root.") from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def list_checkpoints(folder):
    """Complete checkpoints of a run folder, {step: path}, oldest first."""
    found = {}
    for path in Path(folder, "checkpoints").glob("step-*"):
        if match := _STEP.search(path.name):
            found[int(match.group(1))] = path
    return dict(sorted(found.items()))


def newest_checkpoint(folder):
    """Path of the newest checkpoint of a run folder, or None."""
    checkpoints = list_checkpoints(folder)
    return checkpoints[max(checkpoints)] if checkpoints else None


def save_checkpoint(folder, step, save_model, optimizer_arrays, state):
    """Write checkpoints/step-<step> of a run folder: aside, synced, then renamed.

    save_model(path) writes the model's files; optimizer_arrays: {name: float32 array}; state: JSON-able, small.
    Raises OSError (full disk, no permission) that names the path; checkpoints already there stay as they were.
    """
    parent = Path(folder, "checkpoints")
    final = parent / f"step-{step:06d}"
    aside = parent / f".writing-step-{step:06d}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for leftover in parent.glob(".writing-*"):  # of a killed run
            shutil.rmtree(leftover)
        if final.exists():
            return final
        aside.mkdir()
        save_model(aside)
        try:
            save_file(optimizer_arrays, aside / "optimizer.safetensors")
        except SafetensorError as error:  # its message ends in "(os error 28)" and the like
            code = re.search(r"os error (\d+)", str(error))
            raise OSError(int(code.group(1)) if code else 5, str(error)) from error
        write_atomic(aside / "state.json", json.dumps({"format_version": FORMAT_VERSION, "step": step, **state}))
        for path in aside.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        fsync_folder(aside)
        os.rename(aside, final)
        fsync_folder(parent)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        kept = newest_checkpoint(folder)
        raise OSError(error.errno, f"cannot save {final}: {error.strerror or error}. "
                                   f"The last good checkpoint is {kept or 'none'}; make room or choose another "
                                   "run.dir, then run the same command again") from error
    return final


def read_state(checkpoint):
    """state.json of a checkpoint."""
    path = Path(checkpoint, "state.json")
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a readable checkpoint state ({error}); delete {checkpoint} to resume from the "
                         "one before.") from error
    if state.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path}: format_version {state.get('format_version')}, expected {FORMAT_VERSION}; "
                         "this checkpoint was written by another version of mindpangu.")
    return state


def load_optimizer(checkpoint, parameters):
    """Set the given Parameters from optimizer.safetensors, by name."""
    path = Path(checkpoint, "optimizer.safetensors")
    try:
        arrays = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: unreadable ({error}); delete {checkpoint} to resume from the one before.") from error
    expected = {p.name: tuple(p.shape) for p in parameters}
    found = {name: array.shape for name, array in arrays.items()}
    if expected != found:
        wrong = sorted(set(expected.items()) ^ set(found.items()))[:4]
        raise ValueError(f"{path}: belongs to another model, for example {wrong}; resume with the model it was saved "
                         "from, or start a new run.")
    return arrays


def mark_best(folder, step):
    """Point checkpoints/best to a step, in one step."""
    parent = Path(folder, "checkpoints")
    link = parent / ".best.writing"
    link.unlink(missing_ok=True)
    link.symlink_to(f"step-{step:06d}")
    os.replace(link, parent / "best")


def prune_checkpoints(folder, keep):
    """Delete all but the newest `keep` checkpoints and the best one."""
    checkpoints = list_checkpoints(folder)
    best = Path(folder, "checkpoints", "best")
    best_path = best.resolve() if best.exists() else None
    for path in list(checkpoints.values())[:-keep]:
        if path.resolve() != best_path:
            doomed = path.with_name(f".writing-{path.name}")  # a half-deleted folder must not look complete
            os.rename(path, doomed)
            shutil.rmtree(doomed)


def as_arrays(parameters):
    """{name: float32 array} of Parameters."""
    return {p.name: np.ascontiguousarray(p.asnumpy()) for p in parameters}
