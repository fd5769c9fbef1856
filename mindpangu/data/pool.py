"""The pool: the documents of all sources on disk, read by number, so that the memory holds numbers only.

    texts.bin, records.bin    one after the other, UTF-8; a record is a JSON object
    columns.shard             where they end, and of each its source, file, line, language and content key
    malformed.jsonl           what could not be read: source, file, line, reason
    pool.json                 sources, files and languages by number; written last
"""

# N documents
import functools
import json
import os
from pathlib import Path

import numpy as np

from .dedup import content_key
from .shards import open_aside, read_shard, write_aside, write_shard
from .sources import Document, read_sources

_CHUNK_DOCUMENTS = 1 << 16  # whose numbers wait as Python objects


def write_pool(folder, sources, skip_malformed=False, on_progress=None):
    """Writes the Documents of a list of Source to a folder; returns its Pool.

    skip_malformed: what cannot be read goes to malformed.jsonl, instead of ending with its ValueError.
    on_progress(count) is called now and then. Killed, it begins again. Raises ValueError if no document is left.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    columns, files, languages, num_malformed = _Columns(), {}, {}, 0
    with (open_aside(folder / "malformed.jsonl") as malformed, open_aside(folder / "texts.bin") as texts,
          open_aside(folder / "records.bin") as records):

        def note(what):
            nonlocal num_malformed
            num_malformed += 1
            malformed.write(json_line(what._asdict()))

        numbers = {source.name: number for number, source in enumerate(sources)}
        for document in read_sources(sources, note if skip_malformed else None):
            text = document.text.encode()
            record = json.dumps(document.record, ensure_ascii=False).encode("utf-8", "surrogatepass")
            texts.write(text)
            records.write(record)
            columns.append(len(text), len(record), len(document.text), numbers[document.source],
                           files.setdefault(document.file, len(files)), document.line,
                           languages.setdefault(document.language, len(languages)), content_key(document.text))
            if on_progress and len(columns) % 1000 == 0:
                on_progress(len(columns))
    if not len(columns):
        raise ValueError(f"no document is left of {num_malformed} malformed ones, see {folder / 'malformed.jsonl'}: "
                         "check curate.sources, and the fields of each source.")
    write_shard(folder / "columns.shard", columns.arrays())
    described = [{"name": source.name, "category": source.category, "licence": source.licence,
                  "fields": list(source.fields)} for source in sources]
    write_aside(folder / "pool.json", json.dumps(
        {"num_documents": len(columns), "num_malformed": num_malformed, "sources": described, "files": list(files),
         "languages": list(languages)}, ensure_ascii=False, indent=1).encode())
    return Pool(folder)


class Pool:
    """Documents on disk, numbered from 0 in the order in which they were read. Pickles as its folder.

    num_malformed; columns: char_counts_N, sources_N, languages_N (numbers of `sources` and `languages`), keys_N2 (the
    two halves of `dedup.content_key`). Holds some 60 bytes a document. Raises ValueError for a folder without a pool.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        try:
            about = json.loads((self.folder / "pool.json").read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"{folder}: no pool of documents ({error.strerror}): curate its sources first.") from None
        self.sources, self.files, self.languages = about["sources"], about["files"], about["languages"]
        self.num_malformed, self._count = about["num_malformed"], about["num_documents"]
        arrays = read_shard(self.folder / "columns.shard")
        self.char_counts_N, self.sources_N, self.languages_N = (
            arrays[name] for name in ("char_counts", "sources", "languages"))
        self.keys_N2, self._files_N, self._lines_N = arrays["keys"], arrays["files"], arrays["lines"]
        self._text_ends, self._record_ends = (np.append(0, np.cumsum(arrays[name], dtype=np.int64))
                                              for name in ("text_bytes", "record_bytes"))

    def __reduce__(self):
        return open_pool, (str(self.folder.resolve()),)

    def __len__(self):
        return self._count

    def text(self, number):
        return self._read("texts.bin", self._text_ends, number).decode()

    def text_bytes(self, number):
        return self._read("texts.bin", self._text_ends, number)

    def record(self, number):
        return json.loads(self._read("records.bin", self._record_ends, number).decode("utf-8", "surrogatepass"))

    def document(self, number):
        source = self.sources[self.sources_N[number]]
        language = self.languages[self.languages_N[number]]
        return Document(self.text(number), self.record(number), source["name"], language, source["category"],
                        source["licence"], *self.place(number))

    def place(self, number):
        """(file, line) that the document was read from."""
        return self.files[self._files_N[number]], int(self._lines_N[number])

    def _read(self, name, ends, number):
        # Not mapped: pages that were looked at would count as this process's memory.
        begin, end = int(ends[number]), int(ends[number + 1])
        data = os.pread(self._descriptor(name), end - begin, begin)
        if len(data) != end - begin:
            raise ValueError(f"{self.folder / name} is cut off: delete the folder and run the command again.")
        return data

    def _descriptor(self, name):
        return self._opened[name].fileno()

    @functools.cached_property
    def _opened(self):
        return {name: open(self.folder / name, "rb", buffering=0) for name in ("texts.bin", "records.bin")}  # noqa: SIM115


@functools.lru_cache(maxsize=1)
def open_pool(folder):
    """The Pool in a folder, once for all tasks of a worker process."""
    return Pool(folder)


class TextBytes:
    """The texts of some documents of a pool as a sequence of UTF-8 bytes, read when they are asked for."""

    def __init__(self, pool, numbers):
        self.pool, self.numbers = pool, numbers

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, i):
        return self.pool.text_bytes(self.numbers[i])


def json_line(value):
    """value as a line of JSON; half of a surrogate pair, which only JSON can spell, stays spelled out."""
    try:
        return json.dumps(value, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(value).encode() + b"\n"


class _Columns:
    """Rows of numbers that become arrays, some thousands of rows at a time."""

    _NAMES = ("text_bytes", "record_bytes", "char_counts", "sources", "files", "lines", "languages")
    _TYPES = (np.int64, np.int64, np.uint32, np.uint16, np.uint32, np.uint32, np.uint16)

    def __init__(self):
        self._rows, self._keys, self._chunks, self._count = [], [], [], 0

    def __len__(self):
        return self._count

    def append(self, *row):
        self._rows.append(row[:-1])
        self._keys.append(row[-1])
        self._count += 1
        if len(self._rows) == _CHUNK_DOCUMENTS:
            self._flush()

    def _flush(self):
        values = np.array(self._rows, np.int64).reshape(-1, len(self._NAMES))
        chunk = {name: column.astype(dtype)
                 for name, dtype, column in zip(self._NAMES, self._TYPES, values.T, strict=True)}
        chunk["keys"] = np.frombuffer(b"".join(self._keys), np.uint64).reshape(-1, 2)
        self._chunks.append(chunk)
        self._rows, self._keys = [], []

    def arrays(self):
        self._flush()
        return {name: np.concatenate([chunk[name] for chunk in self._chunks]) for name in (*self._NAMES, "keys")}
