"""The pool: the documents of all sources on disk, read by number, so that the memory holds numbers only.

    texts.bin, records.bin    one after the other, UTF-8; a record is a JSON object
    text_ends.bin, ...        columns: where they end, and of each its source, file, line, language and content key
    malformed.jsonl           what could not be read: source, file, line, reason
    pool.json                 sources, files and languages by number; written last
"""

# N documents
import contextlib
import functools
import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .dedup import content_key
from .shards import open_aside, write_aside
from .sources import Document, Malformed, read_unread, to_document

_COLUMNS = {"text_ends": np.int64, "record_ends": np.int64, "char_counts": np.uint32, "keys": np.uint64,
            "sources": np.uint16, "files": np.uint32, "lines": np.uint32, "languages": np.uint16}
_CUT_OFF = "is cut off: delete the folder and run the command again."
_BATCH_RECORDS, _BATCH_BYTES = 2048, 1 << 22  # that a process reads at a time, at most; a longer record is one


def write_pool(folder, sources, skip_malformed=False, on_progress=None, map_batches=map):
    """Writes the Documents of a list of Source to a folder; returns its Pool.

    skip_malformed: what cannot be read goes to malformed.jsonl, instead of ending with its ValueError.
    on_progress(count) is called now and then. map_batches: as map, to work in other processes. Killed, it begins again.
    Raises ValueError if no document is left.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files, languages, num_malformed, count = {}, {}, 0, 0
    place = {source.name: number for number, source in enumerate(sources)}
    ends = {"text_ends": 0, "record_ends": 0}
    with contextlib.ExitStack() as stack:
        malformed, texts, records = (stack.enter_context(open_aside(folder / name))
                                     for name in ("malformed.jsonl", "texts.bin", "records.bin"))
        columns = {name: stack.enter_context(open_aside(_column(folder, name))) for name in _COLUMNS}
        for name in ends:
            columns[name].write(np.zeros(1, np.int64).tobytes())
        for batch in map_batches(_read_batch, _batches(read_unread(sources))):
            for what in batch.malformed:
                if not skip_malformed:
                    raise ValueError(f"{what.file}:{what.line}: {what.reason}")
                num_malformed += 1
                malformed.write(json_line(what._asdict()))
            texts.write(batch.texts)
            records.write(batch.records)
            numbered = {"sources": [place[name] for name in batch.names["sources"]],
                        "files": [files.setdefault(file, len(files)) for file in batch.names["files"]],
                        "languages": [languages.setdefault(x, len(languages)) for x in batch.names["languages"]]}
            for name, values in (batch.columns | numbered).items():
                values = np.asarray(values, _COLUMNS[name])
                if name in ends:
                    values = ends[name] + np.cumsum(values)
                    ends[name] += sum(batch.columns[name])
                columns[name].write(values.tobytes())
            count += len(batch.names["sources"])
            if on_progress:
                on_progress(count)
    if not count:
        raise ValueError(f"no document is left of {num_malformed} malformed ones, see {folder / 'malformed.jsonl'}: "
                         "check curate.sources, and the fields of each source.")
    described = [{"name": source.name, "category": source.category, "licence": source.licence,
                  "fields": list(source.fields)} for source in sources]
    write_aside(folder / "pool.json", json.dumps(
        {"num_documents": count, "num_malformed": num_malformed, "sources": described, "files": list(files),
         "languages": list(languages)}, ensure_ascii=False, indent=1).encode())
    return Pool(folder)


def _column(folder, name):
    return folder / f"{name}.bin"


class _Batch(NamedTuple):
    """What a process made of some records."""

    texts: bytes
    records: bytes
    columns: dict
    names: dict  # of sources, files and languages, lists of strings
    malformed: list


def _batches(all_unread):
    """Lists of Unread, of some hundred kilobytes where lines are long."""
    batch, num_bytes = [], 0
    for unread in all_unread:
        batch.append(unread)
        num_bytes += len(unread.json or unread.parse.args[-1])  # or the fields of a row
        if len(batch) == _BATCH_RECORDS or num_bytes > _BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def _read_batch(batch):
    found = [to_document(unread) for unread in batch]
    documents = [one for one in found if isinstance(one, Document)]
    texts = [document.text.encode() for document in documents]
    records = [unread.json or json.dumps(document.record, ensure_ascii=False).encode("utf-8", "surrogatepass")
               for unread, document in zip(batch, found, strict=True) if isinstance(document, Document)]
    keys = b"".join(content_key(document.text) for document in documents)
    # The ends are lengths here, and become sums.
    columns = {"text_ends": [len(text) for text in texts], "record_ends": [len(record) for record in records],
               "char_counts": [len(document.text) for document in documents],
               "lines": [document.line for document in documents], "keys": np.frombuffer(keys, np.uint64)}
    names = {"sources": [document.source for document in documents], "files": [one.file for one in documents],
             "languages": [document.language for document in documents]}
    return _Batch(b"".join(texts), b"".join(records), columns, names,
                  [one for one in found if isinstance(one, Malformed)])


class Pool:
    """Documents on disk, numbered from 0 in the order in which they were read. Pickles as its folder.

    num_malformed; columns: char_counts_N, sources_N, languages_N (numbers of `sources` and `languages`), keys_N2 (the
    two halves of `dedup.content_key`). They are mapped, 48 bytes a document that processes share. Raises ValueError for
    a folder without a pool.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        try:
            about = json.loads((self.folder / "pool.json").read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"{folder}: no pool of documents ({error.strerror}): curate its sources first.") from None
        self.sources, self.files, self.languages = about["sources"], about["files"], about["languages"]
        self.num_malformed, self._count = about["num_malformed"], about["num_documents"]
        self.char_counts_N, self.sources_N, self.languages_N, self._files_N, self._lines_N = (
            self._mapped(name, self._count) for name in ("char_counts", "sources", "languages", "files", "lines"))
        self.keys_N2 = self._mapped("keys", 2 * self._count).reshape(-1, 2)
        self._text_ends, self._record_ends = (self._mapped(f"{what}_ends", self._count + 1)
                                              for what in ("text", "record"))

    def _mapped(self, name, size):
        try:
            values = np.memmap(_column(self.folder, name), _COLUMNS[name], "r").view(np.ndarray)
        except (OSError, ValueError):  # it is missing, or empty
            values = np.zeros(0)
        if values.size != size:
            raise ValueError(f"{_column(self.folder, name)} {_CUT_OFF}")
        return values

    def __reduce__(self):
        return open_pool, (str(self.folder.resolve()),)

    def __len__(self):
        return self._count

    def text(self, number):
        return self._read("texts.bin", self._text_ends, number).decode()

    def texts(self, numbers):
        """The texts of rising numbers, neighbours read at once."""
        return [data.decode() for data in self._read_all("texts.bin", self._text_ends, numbers)]

    def text_lengths(self, numbers):
        """Their bytes, int64."""
        return self._text_ends[numbers + 1] - self._text_ends[numbers]

    def text_bytes(self, number):
        return self._read("texts.bin", self._text_ends, number)

    def record(self, number):
        return _parse_record(self.record_bytes(number))

    def records_bytes(self, numbers):
        """Those of rising numbers, neighbours read at once."""
        return self._read_all("records.bin", self._record_ends, numbers)

    def record_bytes(self, number):
        return self._read("records.bin", self._record_ends, number)

    def document(self, number):
        return self.documents([number])[0]

    def documents(self, numbers):
        """The Documents of rising numbers, neighbours read at once."""
        documents = []
        for number, text, record in zip(numbers, self.texts(numbers), self.records_bytes(numbers), strict=True):
            source, language = self.sources[self.sources_N[number]], self.languages[self.languages_N[number]]
            documents.append(Document(text, _parse_record(record), source["name"], language, source["category"],
                                      source["licence"], *self.place(number)))
        return documents

    def place(self, number):
        """(file, line) that the document was read from."""
        return self.files[self._files_N[number]], int(self._lines_N[number])

    def _read_all(self, name, ends, numbers):
        begins, stops = ends[np.asarray(numbers)], ends[np.asarray(numbers) + 1]
        firsts = np.flatnonzero(np.append(True, begins[1:] != stops[:-1])) if begins.size else begins
        found, begins_list, stops_list = [], begins.tolist(), stops.tolist()
        for first, last in zip(firsts.tolist(), [*firsts[1:].tolist(), begins.size], strict=True):
            begin = begins_list[first]
            data = self._read_span(name, begin, stops_list[last - 1])
            found += [data[a - begin : b - begin]
                      for a, b in zip(begins_list[first:last], stops_list[first:last], strict=True)]
        return found

    def _read(self, name, ends, number):
        return self._read_span(name, int(ends[number]), int(ends[number + 1]))

    def _read_span(self, name, begin, end):
        # Not mapped: pages that were looked at would count as this process's memory.
        data = os.pread(self._descriptor(name), end - begin, begin)
        if len(data) != end - begin:
            raise ValueError(f"{self.folder / name} {_CUT_OFF}")
        return data

    def _descriptor(self, name):
        return self._opened[name].fileno()

    @functools.cached_property
    def _opened(self):
        return {name: open(self.folder / name, "rb", buffering=0) for name in ("texts.bin", "records.bin")}  # noqa: SIM115


def _parse_record(data):
    return json.loads(data.decode("utf-8", "surrogatepass"))


@functools.lru_cache(maxsize=1)
def open_pool(folder):
    """The Pool in a folder, once for all tasks of a worker process."""
    return Pool(folder)


class TextBytes:
    """The texts of some documents of a pool as a sequence of UTF-8 bytes, read when they are asked for."""

    def __init__(self, pool, numbers):
        self.pool, self.numbers = pool, numbers

    @property
    def lengths_N(self):
        return self.pool.text_lengths(self.numbers)

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, i):
        return self.pool.text_bytes(self.numbers[i])


def escape_halves(data):
    """The bytes of a record with halves of surrogate pairs spelled out as JSON does: valid UTF-8."""
    try:
        data.decode()
        return data
    except UnicodeDecodeError:
        return json.dumps(json.loads(data.decode("utf-8", "surrogatepass"))).encode()


def json_line(value):
    """value as a line of JSON; half of a surrogate pair, which only JSON can spell, stays spelled out."""
    try:
        return json.dumps(value, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(value).encode() + b"\n"
