"""Shards: files of named NumPy arrays with a checksum, in a folder whose manifest says what they were made from.

A shard file, little-endian:

| bytes | content |
|---|---|
| 8 | magic "PGSHARD1" |
| 8 | uint64 length of the header in bytes |
| ... | header, JSON: {"arrays": [{name, dtype, shape, codec "raw" or "zstd", bytes}, ...]} in sorted name order |
| ... | the arrays' bytes, one after the other |
| 16 | XXH3-128 of everything before |

The same arrays give the same bytes: no timestamps, one fixed compression level, one thread. Every file is written
aside, fsynced and renamed, so that a name stands for a whole file after SIGKILL or a power cut.
"""

import contextlib
import io
import json
import os
from pathlib import Path

import numpy as np
import xxhash
import zstandard

FORMAT_VERSION = 1
_MAGIC = b"PGSHARD1"
# On the teacher's top-k at k = 10: level 1 17.2 bytes per token, level 3 17.9 (it finds matches in noise), level 15
# 16.7 in 40 times the time.
_ZSTD_LEVEL = 1
_ASIDE = ".partial"
_AGAIN = "delete it and run the command that wrote it again"


def write_shard(path, arrays):
    """Writes {name: array} and returns the checksum, 32 hex digits. Booleans and numbers only (ValueError otherwise).

    Raises OSError naming the path (no room, no permission); what stood at the path before is untouched then.
    """
    entries, payload = [], []
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        if array.dtype.kind not in "biuf":
            raise ValueError(f"array {name!r} has dtype {array.dtype}: a shard holds booleans and numbers only.")
        data = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).tobytes()
        packed = zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(data)
        codec, data = ("zstd", packed) if len(packed) < len(data) else ("raw", data)
        dtype = array.dtype.newbyteorder("<").str
        entries.append({"name": name, "dtype": dtype, "shape": array.shape, "codec": codec, "bytes": len(data)})
        payload.append(data)
    header = json.dumps({"arrays": entries}, separators=(",", ":")).encode()
    content = b"".join([_MAGIC, len(header).to_bytes(8, "little"), header, *payload])
    checksum = xxhash.xxh3_128(content)
    write_aside(path, content + checksum.digest())
    return checksum.hexdigest()


def read_shard(path, digest=None):
    """Returns {name: array}. digest: the checksum the caller knows from elsewhere, e.g. a manifest.

    Raises ValueError naming the file if it is truncated, corrupted or not the one the digest belongs to.
    """
    content = Path(path).read_bytes()
    if content[:8] != _MAGIC or len(content) < 32:
        raise ValueError(
            f"{path}: {len(content)} bytes starting with {content[:8]!r}, expected a shard starting with {_MAGIC!r}: "
            f"{_AGAIN}."
        )
    body, stored = memoryview(content)[:-16], content[-16:].hex()
    found = xxhash.xxh3_128(body).hexdigest()
    if found != stored:
        raise ValueError(
            f"{path}: truncated or corrupted: checksum of its {len(content)} bytes is {found}, expected {stored}: "
            f"{_AGAIN}."
        )
    if digest is not None and found != digest:
        raise ValueError(f"{path}: another shard: checksum {found}, expected {digest}: {_AGAIN}.")
    header_end = 16 + int.from_bytes(body[8:16], "little")
    arrays, start = {}, header_end
    for entry in json.loads(bytes(body[16:header_end]))["arrays"]:
        data = body[start : start + entry["bytes"]]
        start += entry["bytes"]
        if entry["codec"] == "zstd":
            data = zstandard.ZstdDecompressor().decompress(data)
        # A copy, because arrays over bytes are read-only.
        arrays[entry["name"]] = np.frombuffer(data, dtype=entry["dtype"]).reshape(entry["shape"]).copy()
    assert start == len(body)
    return arrays


class ShardFolder:
    """A folder of numbered shards and manifest.json {format_version, binding, num_shards, shards: {number: ...}}.

    The manifest lists finished shards with their checksums and the binding: what the shards were made from (model,
    tokenizer, template, data hashes). One writer at a time.
    """

    def __init__(self, folder, manifest):
        self.folder, self._manifest = folder, manifest

    @classmethod
    def open(cls, folder, binding, num_shards):
        """Creates the folder, or opens it.

        binding: dict[str, str]. Raises ValueError listing every key of the binding that differs from the manifest's.
        """
        folder = Path(folder)
        if num_shards < 1:
            raise ValueError(f"{folder}: num_shards={num_shards}: expected at least one shard.")
        manifest = {"format_version": FORMAT_VERSION, "binding": dict(binding), "num_shards": num_shards, "shards": {}}
        path = folder / "manifest.json"
        if path.exists():
            manifest = _read_manifest(path, manifest)
        folder.mkdir(parents=True, exist_ok=True)
        # Only now: a run that is refused must not touch the files of the run that owns the folder.
        opened = cls(folder, manifest)
        if not path.exists():
            opened._write_manifest()
        return opened

    @classmethod
    def find(cls, folder):
        """Opens a folder for reading, whatever it is bound to. Raises ValueError if it is none."""
        path = Path(folder) / "manifest.json"
        if not path.is_file():
            raise ValueError(f"{folder}: no folder of shards: {path.name} is missing.")
        return cls(Path(folder), _read_manifest(path))

    @property
    def num_shards(self):
        return self._manifest["num_shards"]

    @property
    def binding(self):
        return dict(self._manifest["binding"])

    def entry(self, i):
        """What the manifest says of shard i: bytes, xxh3_128 and what `take_file` was told; None: not written."""
        return self._manifest["shards"].get(str(i))

    @property
    def complete(self):
        return not self.missing()

    def missing(self):
        """Numbers of the shards still to be written: not in the manifest, or their file has been deleted."""
        recorded = self._manifest["shards"]
        return [i for i in range(self.num_shards) if str(i) not in recorded or not self._path(i).exists()]

    @property
    def num_done(self):
        return self.num_shards - len(self.missing())

    def write(self, i, arrays):
        """Writes shard i and records it as finished; removes what a killed writer left behind."""
        self.remove_leftovers()
        # The file first: a shard in the manifest is always on disk. Killed in between, the shard is written again.
        self.record({str(i): self.write_file(i, arrays)})

    def remove_leftovers(self):
        for leftover in Path(self.folder).glob("*" + _ASIDE):
            leftover.unlink()

    def write_file(self, i, arrays):
        """Writes shard i; returns its entry of the manifest, for `record`."""
        assert 0 <= i < self.num_shards
        digest = write_shard(self._path(i), arrays)
        return {"bytes": self._path(i).stat().st_size, "xxh3_128": digest}

    def take_file(self, i, file, digest, **numbers):
        """Makes a file of this folder, from `write_shard` with that digest, shard i; numbers go into its entry."""
        os.replace(file, self._path(i))
        self.record({str(i): {"bytes": self._path(i).stat().st_size, "xxh3_128": digest, **numbers}})

    def record(self, entries, on_disk=True):
        """Adds {number: entry} of files that are there to the manifest."""
        self._manifest["shards"].update(entries)
        if on_disk:
            self._write_manifest()

    def read(self, i):
        """Returns the arrays of shard i, checked against the manifest's length and checksum."""
        path, entry = self._path(i), self._manifest["shards"].get(str(i))
        if entry is None or not path.exists():
            raise ValueError(
                f"{path}: shard {i} of {self.num_shards} is not written yet: run the command that writes it."
            )
        if path.stat().st_size != entry["bytes"]:
            raise ValueError(f"{path}: {path.stat().st_size} bytes, expected {entry['bytes']}: {_AGAIN}.")
        return read_shard(path, entry["xxh3_128"])

    def read_all(self):
        """Yields the arrays of every shard in order."""
        for i in range(self.num_shards):
            yield self.read(i)

    def _path(self, i):
        return self.folder / f"{i:05d}.shard"

    def _write_manifest(self):
        shards = self._manifest["shards"]
        # Numeric order, so that the bytes don't depend on the order in which shards were finished.
        ordered = {**self._manifest, "shards": {i: shards[i] for i in sorted(shards, key=int)}}
        write_aside(self.folder / "manifest.json", (json.dumps(ordered, indent=1) + "\n").encode())


class SharedShards:
    """The missing shards of a ShardFolder, divided among ranks that write them side by side; rank 0 keeps the manifest.

    world: a runtime.cluster.World. Every rank writes its `missing()` ones in order, then calls `finish`. They wait for
    each other after every shard, so that what is in the manifest survives a kill.
    """

    def __init__(self, shards, world):
        self._shards, self._world = shards, world
        missing = shards.missing()
        self._own = missing[world.rank::world.size]
        self._rounds = -(-len(missing) // world.size)
        if world.is_main:
            shards.remove_leftovers()
        world.gather("begin shards")
        self.num_shards = shards.num_shards

    @property
    def num_done(self):
        return self._shards.num_done

    def missing(self):
        return self._own

    def write(self, i, arrays):
        self._record({str(i): self._shards.write_file(i, arrays)})

    def finish(self):
        """Returns when the shards of all ranks are there, and known to this one's ShardFolder."""
        while self._rounds:
            self._record({})
        self._world.gather("end shards")  # rank 0 has written the manifest

    def _record(self, own):
        self._rounds -= 1
        for entries in self._world.gather("a shard", own):
            self._shards.record(entries, on_disk=False)
        if self._world.is_main:
            self._shards.record({})


def _read_manifest(path, wanted=None):
    """The manifest at a path. wanted: raises ValueError if it is for something else."""
    try:
        manifest = json.loads(path.read_bytes())
        binding, _ = manifest["binding"].keys(), manifest["shards"].keys()
        pairs = [(key, manifest[key], wanted and wanted[key]) for key in ("num_shards", "format_version")]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a manifest ({error!r}): delete the folder and run the command again.") from error
    if wanted is None:
        return manifest
    pairs = [(key, manifest["binding"].get(key), wanted["binding"].get(key))
             for key in sorted(binding | wanted["binding"].keys())] + pairs
    differences = [f"{key} differs: manifest {was}, this run {now}" for key, was, now in pairs if was != now]
    if differences:
        raise ValueError(
            f"{path.parent}: refuses to use shards made from something else: {'; '.join(differences)}. Use what they "
            "were made from, or choose another folder."
        )
    return manifest


def write_aside(path, content):
    """Write bytes to a file in one step: the old content or the new one, never a part. OSError names the path."""
    with open_aside(path) as file:
        file.write(content)


@contextlib.contextmanager
def open_aside(path):
    """A binary file to write that takes the path's place, on disk, when the block ends without an error.

    Until then, and after an error, what stood at the path stands there. An OSError of a write names the path.
    """
    path = Path(path)
    aside = path.with_name(path.name + _ASIDE)
    try:
        with io.BufferedWriter(_Aside(aside, path)) as file:
            yield file
            file.flush()
            file.raw.sync()
        os.replace(aside, path)
        # The rename itself is on disk only once the folder is.
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


class _Aside(io.FileIO):
    """A file whose errors name the path that it is written for; those of a file give no name."""

    def __init__(self, aside, path):
        super().__init__(aside, "w")
        self._path = path

    def write(self, data):
        with self._named():
            return super().write(data)

    def sync(self):
        with self._named():
            os.fsync(self.fileno())

    @contextlib.contextmanager
    def _named(self):
        try:
            yield
        except OSError as error:
            what = f"{os.strerror(error.errno)} (after {self.tell()} bytes)"
            raise OSError(error.errno, what, str(self._path)) from error
