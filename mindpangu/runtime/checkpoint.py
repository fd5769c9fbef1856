"""Checkpoints: a folder per step, complete or absent. Also the run folder's lock. Knows no model.

    checkpoints/step-000300/    what save_model writes, optimizer-00001-of-00004.safetensors ..., state.json
    checkpoints/best            a link to the step with the best validation
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

FORMAT_VERSION = 2
LOCK = ".lock"  # a file in a folder that is being written
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
        file = open(folder / LOCK, "a+", encoding="utf-8")  # noqa: SIM115 - closing it gives up the lock
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


def save_checkpoint(folder, step, save_model, optimizer_arrays, state, world, part=(0, 1)):
    """Write checkpoints/step-<step> of a run folder: aside, synced, then renamed. Every rank has to call it.

    save_model(path), called on rank 0, writes the model's files; optimizer_arrays: {name: flat array}, this
    rank's chunks, which it writes itself as the i-th of n with part=(i, n); whole arrays are written by rank 0 alone;
    state: JSON-able, small, rank 0's counts.
    Raises OSError (full disk, no permission) that names the path; checkpoints already there stay as they were.
    """
    parent = Path(folder, "checkpoints")
    final = parent / f"step-{step:06d}"
    aside = parent / f".writing-step-{step:06d}"

    def begin():
        parent.mkdir(parents=True, exist_ok=True)
        for leftover in parent.glob(".writing-*"):  # of a killed run
            shutil.rmtree(leftover)
        if final.exists():
            return False
        aside.mkdir()
        return True

    try:
        if not world.on_main("begin a checkpoint", begin):
            return final
        if world.is_main or part[1] > 1:
            _write_optimizer(aside / _optimizer_file(*part), optimizer_arrays)
        if world.is_main:
            save_model(aside)
            write_atomic(aside / "state.json", json.dumps({"format_version": FORMAT_VERSION, "step": step, **state}))
        world.gather("write a checkpoint")
        if world.is_main:
            for path in aside.iterdir():
                _fsync(path)
            fsync_folder(aside)
            os.rename(aside, final)
            fsync_folder(parent)
        world.gather("finish a checkpoint")
    except OSError as error:
        if world.is_main:  # another's files would be missed by rank 0, whose message would hide the reason
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


def load_optimizer(checkpoint, sizes, rank=0, num_ranks=1):
    """{name: float32 array}: a rank's chunks of the optimizer's arrays, however many ranks wrote them.

    sizes: {name: elements} of the whole arrays. A chunk is as in runtime.distributed, the whole array for one rank.
    """
    files = sorted(Path(checkpoint).glob("optimizer-*-of-*.safetensors"))
    try:
        num_written = int(files[0].stem.rpartition("-")[2]) if files else 0
        if [file.name for file in files] != [_optimizer_file(r, num_written) for r in range(num_written)] or not files:
            raise OSError(f"{len(files)} of {num_written or 'its'} optimizer files are there")
        with contextlib.ExitStack() as stack:
            opened = [stack.enter_context(safe_open(file, "numpy")) for file in files]
            found = {name: sum(file.get_slice(name).get_shape()[0] for file in opened) for name in opened[0].keys()}
            expected = {name: num_written * -(-size // num_written) for name, size in sizes.items()}
            if expected != found:
                wrong = sorted(set(expected.items()) ^ set(found.items()))[:4]
                raise ValueError(f"{files[0]}: belongs to another model, for example {wrong}; resume with the model it "
                                 "was saved from, or start a new run.")
            return {name: _read_chunk(opened, name, size, rank, num_ranks) for name, size in sizes.items()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{checkpoint}: optimizer state unreadable ({error}); delete {checkpoint} to resume from the "
                         "one before.") from error


def _read_chunk(files, name, size, rank, num_ranks):
    """This rank's chunk of an array that is spread over files in chunks of another size."""
    stored, chunk = -(-size // len(files)), -(-size // num_ranks)
    first, last = min(size, rank * chunk), min(size, (rank + 1) * chunk)
    array = np.zeros(chunk, np.float32)
    for i, file in enumerate(files):
        start, end = max(first, i * stored), min(last, (i + 1) * stored)
        if start < end:
            part = file.get_slice(name)[start - i * stored:end - i * stored]
            if part.dtype == np.uint16:  # bfloat16, see as_arrays
                part = (part.astype(np.uint32) << 16).view(np.float32)
            array[start - first:end - first] = part
    return array


def _write_optimizer(path, arrays):
    try:
        save_file(arrays, path)
    except SafetensorError as error:  # its message ends in "(os error 28)" and the like
        code = re.search(r"os error (\d+)", str(error))
        raise OSError(int(code.group(1)) if code else 5, str(error)) from error
    _fsync(path)


def _optimizer_file(rank, num_ranks):
    return f"optimizer-{rank + 1:05d}-of-{num_ranks:05d}.safetensors"


def _fsync(path):
    with open(path, "rb") as file:
        os.fsync(file.fileno())


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
    """{name: flat array} of float32 Parameters, or of bfloat16 ones their bits as uint16: NumPy has no such type."""
    flat = {p.name: np.ascontiguousarray(p.asnumpy()).reshape(-1) for p in parameters}
    return {name: array if array.dtype == np.float32 else array.view(np.uint16) for name, array in flat.items()}
