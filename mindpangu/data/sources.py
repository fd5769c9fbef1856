"""Sources of raw data: files of many kinds -> a stream of Document, a record in memory at a time.

A source is a name for files of one kind of record. What is malformed is told by file and line. Each Document carries
the plain text that duplicates, compression ratios and contamination are judged by, beside the record it came from.
"""

import codecs
import functools
import glob
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .documents import TEXT_FILES, parse_line, parse_messages, read_lines, shown

FILES = (*TEXT_FILES, ".parquet")
# Keys whose values make the text of a record, for sources that do not say: the first of these that a record has.
KNOWN_FIELDS = (("messages",), ("question", "answer"), ("prompt", "answer"), ("prompt",),
                ("instruction", "input", "output"), ("instruction", "output"), ("text",))
_PARQUET_ROWS = 256  # at a time
# (script, its most spoken language, ranges of code points); only letters in them count.
_SCRIPTS = (
    ("latin", "en", ((0x41, 0x2AF), (0x1E00, 0x1EFF), (0xFF21, 0xFF5A))),
    ("han", "zh", ((0x3005, 0x3007), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323AF))),
    ("kana", "ja", ((0x3041, 0x30FF), (0x31F0, 0x31FF), (0xFF66, 0xFF9D))),
    ("hangul", "ko", ((0x1100, 0x11FF), (0x3131, 0x318E), (0xAC00, 0xD7AF))),
    ("cyrillic", "ru", ((0x400, 0x52F),)),
    ("arabic", "ar", ((0x600, 0x6FF), (0x750, 0x77F), (0xFB50, 0xFDFF), (0xFE70, 0xFEFC))),
    ("devanagari", "hi", ((0x900, 0x97F),)),
    ("greek", "el", ((0x370, 0x3FF), (0x1F00, 0x1FFF))),
    ("hebrew", "he", ((0x590, 0x5FF), (0xFB1D, 0xFB4F))),
    ("thai", "th", ((0xE00, 0xE7F),)),
    ("other", "und", ()),  # every other letter
)
_ASCII_LETTER = re.compile("[A-Za-z]")
_END_OF_LETTERS = 0x323B0  # code points above are no letters
_NO_LANGUAGE = "und"  # ISO 639: undetermined
# A Chinese text on mathematics or programs has more Latin letters than Chinese characters.
_MIN_CJK_SHARE = 0.2
_MIN_KANA_SHARE = 0.1  # of Chinese characters and kana, in Japanese


class Source(NamedTuple):
    """paths: files, folders and globs. fields: the keys of a record whose values make its text, see `record_text`."""

    name: str
    paths: str | tuple[str, ...]
    language: str | None = None  # of all its documents; None: of each one, see `detect_language`
    category: str | None = None
    licence: str | None = None
    fields: tuple[str, ...] = ()


class Document(NamedTuple):
    """A record of a source."""

    text: str
    record: dict
    source: str
    language: str
    category: str | None
    licence: str | None
    file: str
    line: int  # from 1; in Parquet the row


class Malformed(NamedTuple):
    """What could not be read as a record, and why."""

    source: str
    file: str
    line: int
    reason: str


def read_sources(sources, on_malformed=None):
    """Iterates over the Documents of a list of Source: source after source, its files in order of their names.

    Holds one record at a time, of a Parquet file 256 and what Arrow reads of a row group.
    on_malformed: called with each Malformed, which is left out then; None: ValueError "file:line: reason".
    Raises ValueError at once for sources of one name and for paths without files, and on the way for a file that is
    empty, cut off or not of its kind, which is never left out; ImportError for Parquet where pyarrow is missing.
    """
    return _read(read_unread(sources), on_malformed)


def _read(all_unread, on_malformed):
    for unread in all_unread:
        found = to_document(unread)
        if isinstance(found, Document):
            yield found
        elif on_malformed is None:
            raise ValueError(f"{found.file}:{found.line}: {found.reason}")
        else:
            on_malformed(found)


def list_files(source):
    """The files of a Source, each once, sorted within each of its paths.

    Folders are searched to any depth, hidden files and folders left out. Of folders and globs, files of other kinds
    than FILES are left out; one named as it is must be of one of them. Raises ValueError if a path gives no file.
    """
    files = {}
    for path in [source.paths] if isinstance(source.paths, (str, Path)) else source.paths:
        if Path(path).is_file():
            found = [Path(path)]
            if not found[0].name.endswith(FILES):
                raise ValueError(f"source {source.name!r}: {path}: unknown kind of file: expected one of "
                                 f"{', '.join(FILES)}.")
        else:
            found = Path(path).rglob("*") if Path(path).is_dir() else map(Path, glob.glob(str(path), recursive=True))
            found = sorted(file for file in found if file.name.endswith(FILES) and file.is_file()
                           and not any(part.startswith(".") for part in file.parts[len(Path(path).parts):]))
            if not found:
                raise ValueError(f"source {source.name!r}: no file at {path}: expected a file, or a folder or glob "
                                 f"with files that end in {', '.join(FILES)}.")
        files.update((file.resolve(), file) for file in found if file.resolve() not in files)
    if not files:
        raise ValueError(f"source {source.name!r} has no paths: expected at least one file, folder or glob.")
    return list(files.values())


def record_text(record, fields=()):
    """The plain text of a record: the values of its fields, each from a line of its own, normalised.

    A value is a string, a number, null (no text), a list of strings, or a list of messages: of each its thoughts and
    its content. fields: (): the first of KNOWN_FIELDS all of whose keys the record has.
    Raises ValueError saying what is missing or of another type, or that there is no text.
    """
    if not fields:
        fields = next((known for known in KNOWN_FIELDS if all(key in record for key in known)), None)
        if fields is None:
            raise ValueError(f"keys {shown(sorted(record))}: expected {'; or '.join(map(', '.join, KNOWN_FIELDS))}; "
                             "for others, name them in the source's fields")
    parts = []
    for key in fields:
        if key not in record:
            raise ValueError(f"missing key {key!r}: expected the source's fields {', '.join(fields)}")
        parts += _texts(record[key], key)
    text = normalize_text("\n".join(part for part in parts if part))
    if not text.strip():
        raise ValueError(f"{', '.join(fields)} is empty: expected some text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{', '.join(fields)} holds half of a surrogate pair: expected valid Unicode") from None
    return text


def normalize_text(text):
    """text in Unicode's composed form (NFC), lines ended by \\n, without white space at their ends or empty lines
    around it.

    NFC changes no meaning; NFKC would make x² of mathematics x2. Every character that is no white space stays, NUL too.
    """
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n")
    return "\n".join(line.rstrip() for line in text.split("\n")).strip("\n")


def script_shares(text):
    """{script: its share of the text's letters}, those that occur; {} for a text without letters.

    Scripts: latin, han, kana, hangul, cyrillic, arabic, devanagari, greek, hebrew, thai, other.
    """
    if text.isascii():  # whose letters are all Latin
        return {"latin": 1.0} if _ASCII_LETTER.search(text) else {}
    codes_C = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    counts = np.bincount(_script_numbers()[codes_C], minlength=len(_SCRIPTS) + 1)[1:].tolist()
    total = sum(counts)
    return {script: count / total for (script, _, _), count in zip(_SCRIPTS, counts, strict=True) if count}


def detect_language(text):
    """The language (ISO 639-1) most spoken in the text's script: Latin letters count as en, whichever language it is.

    zh, ja or ko from a fifth of Chinese characters, kana and Hangul among the letters on: ja if kana are a tenth of the
    first two, ko if there is more Hangul than either. "und" for a text without letters, or in another script.
    """
    if text.isascii():
        return "en" if _ASCII_LETTER.search(text) else _NO_LANGUAGE
    shares = script_shares(text)
    han, kana, hangul = (shares.pop(script, 0.0) for script in ("han", "kana", "hangul"))
    if han + kana + hangul >= _MIN_CJK_SHARE:
        if hangul > max(han, kana):
            return "ko"
        return "ja" if kana >= _MIN_KANA_SHARE * (han + kana) else "zh"
    languages = {script: language for script, language, _ in _SCRIPTS}
    return languages[max(shares, key=shares.get)] if shares else _NO_LANGUAGE


class Unread(NamedTuple):
    """A record that has not been looked at. parse(): it, or ValueError; it can be pickled. json: the line of JSON that
    it is, None where it is none."""

    source: Source
    file: str
    line: int
    parse: Callable
    json: bytes | None


def read_unread(sources):
    """Iterates over the Unread of a list of Source, as `read_sources` over their Documents."""
    names = [source.name for source in sources]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"several sources are named {', '.join(map(repr, repeated))}: give each a name of its own.")
    return _unread([(source, list_files(source)) for source in sources])


def _unread(sources):
    for source, files in sources:
        for file in files:
            name = str(file)
            for unread in _parquet_rows(file) if file.suffix == ".parquet" else _lines(file):
                yield Unread(source, name, *unread)


def to_document(unread):
    """The Document of an Unread, or Malformed."""
    source, file, line, parse, _ = unread
    try:
        record = parse()
        text = record_text(record, source.fields)
    except ValueError as error:
        return Malformed(source.name, file, line, str(error))
    return Document(text, record, source.name, source.language or detect_language(text), source.category,
                    source.licence, file, line)


def _lines(file):
    """(line number, a function that gives its record or raises ValueError, its JSON) of a text file."""
    file, is_json = str(file), file.suffix != ".txt"
    for number, line in read_lines(file):
        if is_json:
            line = line.removeprefix(codecs.BOM_UTF8).strip(b" \t\r\n")
        # A carriage return between two values would end the line for some readers.
        yield number, functools.partial(parse_line, file, line), line if is_json and b"\r" not in line else None


def _parquet_rows(file):
    """(row from 1, a function that gives its record or raises ValueError, None) of a Parquet file. Times and decimal
    numbers, which JSON lacks, become strings."""
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError:
        raise ImportError(f"{file}: reading Parquet needs pyarrow: pip install 'mindpangu[curate]'.") from None
    number = 0
    try:
        with pa.parquet.ParquetFile(file) as table:
            schema = pa.schema([_plain_field(pa, field, file) for field in table.schema_arrow])
            for batch in table.iter_batches(_PARQUET_ROWS):
                batch = batch.cast(schema)
                for i in range(batch.num_rows):
                    number += 1
                    # One by one: a string that is not UTF-8 is an error of its row only.
                    try:
                        parse = functools.partial(_given, batch.slice(i, 1).to_pylist()[0])
                    except ValueError as error:
                        parse = functools.partial(_refuse, str(error))
                    yield number, parse, None
    except pa.ArrowException as error:
        raise ValueError(f"{file}: cannot be read as Parquet ({error}): fetch or write the file again.") from None
    except OSError as error:
        if error.errno is not None:  # the machine's, not the file's
            raise
        raise ValueError(f"{file}: cannot be read as Parquet ({error}): fetch or write the file again.") from None
    if not number:
        raise ValueError(f"{file}: the file is empty: expected at least one row.")


def _given(record):
    return record


def _refuse(reason):
    raise ValueError(reason)


def _plain_field(pa, field, file):
    if pa.types.is_temporal(field.type) or pa.types.is_decimal(field.type):
        return field.with_type(pa.string())
    if not _is_plain(pa.types, field.type):
        raise ValueError(f"{file}: column {field.name!r} has type {field.type}, which JSON cannot hold: leave the "
                         "column out or make it a string.")
    return field


def _is_plain(types, kind):
    if types.is_struct(kind):
        return all(_is_plain(types, field.type) for field in kind)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_dictionary(kind):
        return _is_plain(types, kind.value_type)
    return (types.is_string(kind) or types.is_large_string(kind) or types.is_integer(kind) or types.is_floating(kind)
            or types.is_boolean(kind) or types.is_null(kind))


def _texts(value, key):
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return [str(value)]
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return value
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        return [text for message in parse_messages(value, key) for text in (message.thoughts, message.content)]
    raise ValueError(f"{key}={shown(value)}: expected a string, a number, a list of strings or a list of messages")


@functools.cache
def _script_numbers():
    """uint8 for every code point: 0, or 1 + the index of a letter's script."""
    numbers = np.zeros(0x110000, np.uint8)
    categories = "".join(unicodedata.category(chr(code))[0] for code in range(_END_OF_LETTERS)).encode()
    numbers[:_END_OF_LETTERS] = (np.frombuffer(categories, np.uint8) == ord("L")) * len(_SCRIPTS)  # "other"
    for number, (_, _, ranges) in enumerate(_SCRIPTS, start=1):
        for first, last in ranges:
            span = numbers[first : last + 1]
            span[span > 0] = number
    return numbers
