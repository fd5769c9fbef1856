"""Readers: files of chats, of problems (in GSM8K form, or bare), of plain documents -> Example or str.

A reader returns a list: the files are small enough to hold in memory (post-training data). `read_lines` and
`parse_line` are for those that are not, see sources.py.
"""
import codecs
import gzip
import json
import re
import zlib
from pathlib import Path
from typing import NamedTuple

import zstandard

TEXT_FILES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt")
TASK_TYPES = ("math", "code", "preference")
ROLES = ("system", "user", "assistant", "tool", "function")
# One equation of a GSM8K rationale, as in "48/2 = <<48/2=24>>24". No annotation of the data set nests another.
ANNOTATION = re.compile(r"<<([^<>\n]*)>>")
# The final answer of a GSM8K problem once commas and a dollar sign are gone.
NUMBER = re.compile(r"-?\d+(\.\d+)?")
_CHUNK_BYTES = 1 << 16
# A zstd block of a few bytes can stand for 128 KiB, so that this many hold at most some 130 MB.
_ZSTD_CHUNK_BYTES = 1 << 12
_MAX_LINE_BYTES = 1 << 28


class Message(NamedTuple):
    """One turn. role: one of ROLES; thoughts: the chain of thought, on an assistant's turn only."""

    role: str
    content: str
    thoughts: str | None = None


class Example(NamedTuple):
    """One conversation, whose last message is the reference reply; that of a bare problem is empty."""

    messages: tuple[Message, ...]
    value: str | None = None  # the verifiable final answer where there is one, e.g. "72"
    tests: tuple[str, ...] = ()  # Python programs, each run after the answer's code; one that raises has failed
    task_type: str | None = None  # one of TASK_TYPES, the verifier that judges an answer


def task_type(example):
    """Which verifier judges answers to an Example: one of TASK_TYPES, its own or what it has says."""
    return example.task_type or ("code" if example.tests else "math" if example.value is not None else "preference")


def read_chats(paths, on_error="raise"):
    """Read JSONL lines {"messages": [{"role", "content"[, "reasoning_content"]}, ...][, "value": "..."]}.

    Other keys are ignored; an empty or null reasoning_content means no thoughts. The last message is the assistant's,
    a system message can only be the first.
    Returns (examples, errors); errors is empty unless on_error="skip", which collects what "raise" would raise.
    Raises ValueError "file:line: reason: what was expected" for a malformed line, and for an empty file in both modes.
    """
    return _read_records(paths, _parse_chat, on_error)


def read_gsm8k(paths, dress, on_error="raise"):
    """Read JSONL lines {"question", "answer"}, the answer a rationale with <<48/2=24>> annotations, then "#### n".

    thoughts: the rationale without annotations. answer: the annotated equations, one a line, then "#### n".
    dress: see dress_example. Returns and errors as read_chats. Source: Cobbe et al. 2021, arXiv:2110.14168, appendix C.
    """
    check_dress(dress)
    return _read_records(paths, lambda fields: _parse_gsm8k(fields, dress), on_error)


def read_problems(paths, on_error="raise"):
    """Read JSONL lines {"prompt" or "messages", "answer" and/or "tests", "task_type"}: problems to be answered.

    prompt: what the user says; or messages as in read_chats, up to the user's last turn. answer: the verifiable final
    answer, a string or a number; tests: a list of Python programs that are run after the answer's code. task_type: one
    of TASK_TYPES; without it, code where there are tests, math where there is an answer, else preference.
    The Examples end in an assistant's message with empty content. Returns and errors as read_chats.
    """
    return _read_records(paths, _parse_problem, on_error)


def read_documents(paths, on_error="raise"):
    """Read JSONL lines {"text"}, or a .txt file as one document. Returns (texts, errors) as read_chats."""
    return _read_records(paths, lambda fields: text_field(fields, "text"), on_error)


def to_example(record, dress, fields=()):
    """The Example of a record that a source of any form has: chats, GSM8K's, {"prompt", "answer"}, {"instruction",
    "input", "output"}; or with fields: keys whose values are the prompt, the last one the reply.

    Raises ValueError for a record without a reply to learn, such as plain text.
    """
    check_dress(dress)
    if fields and tuple(fields) != ("messages",):
        if len(fields) < 2:
            raise ValueError(f"fields={list(fields)}: expected those of the prompt, then that of the reply")
        return _example([_plain(record, key) for key in fields[:-1]], _plain(record, fields[-1]))
    if "messages" in record:
        return _parse_chat(record)
    if "question" in record and "answer" in record:
        if isinstance(record["answer"], str) and "####" in record["answer"]:
            return _parse_gsm8k(record, dress)
        return _example([_plain(record, "question")], _plain(record, "answer"))
    if "prompt" in record and record.get("answer") is not None:
        value = _plain(record, "answer")
        return _example([_plain(record, "prompt")], value)._replace(value=value)
    if "instruction" in record and "output" in record:
        prompt = [_plain(record, "instruction"), _plain(record, "input") if record.get("input") else ""]
        return _example(prompt, _plain(record, "output"))
    raise ValueError(f"keys {shown(sorted(record))}: no reply to learn")


def to_chat(example):
    """The record that `read_chats` reads as this Example."""
    messages = [{"role": message.role, "content": message.content} |
                ({"reasoning_content": message.thoughts} if message.thoughts else {}) for message in example.messages]
    return {"messages": messages} | ({"value": example.value} if example.value is not None else {})


def _example(prompt, reply):
    if not reply.strip():
        raise ValueError("the reply is empty: expected some text")
    return Example((Message("user", "\n".join(filter(None, prompt))), Message("assistant", reply)))


def _plain(record, key):
    """The value of a key as text: numbers are, and the lines of a list."""
    value = record.get(key)
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        value = "\n".join(value)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    return text_field({key: value}, key, empty=True)


def check_dress(dress):
    if dress not in ("reasoning", "fast", "result"):
        raise ValueError(f"dress={dress!r} is unknown: choose 'reasoning', 'fast' or 'result'.")


def dress_example(question, thoughts, answer, value, dress):
    """Put a verifiable problem into a chat.

    dress "reasoning": the chain of thought, then the answer; "fast": the answer alone;
    "result": the line "#### n" alone. Raises ValueError for any other.
    """
    check_dress(dress)
    if dress == "result":
        reply = Message("assistant", f"#### {value}")
    else:
        reply = Message("assistant", answer, thoughts or None if dress == "reasoning" else None)
    return Example((Message("user", question), reply), value)


def _parse_chat(fields):
    if "messages" not in fields:
        raise ValueError("missing key 'messages': expected a list of {\"role\", \"content\"}")
    parsed = parse_messages(fields["messages"])
    if parsed[-1].role != "assistant":
        raise ValueError(f"the last message has role {parsed[-1].role!r}: expected 'assistant', the answer to learn")
    value = fields.get("value")
    if value is not None:
        value = text_field(fields, "value")
    return Example(parsed, value)


def parse_messages(messages, name="messages"):
    """The Messages of a record's list; name: its key, for the ValueError of what is malformed."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{name}={shown(messages)}: expected a non-empty list of {{\"role\", \"content\"}}")
    return tuple(_parse_message(message, position, f"{name}[{position}]") for position, message in enumerate(messages))


def _parse_message(fields, position, where):
    if not isinstance(fields, dict):
        raise ValueError(f"{where}={shown(fields)}: expected an object with role and content")
    role = text_field(fields, "role", where)
    if role not in ROLES:
        raise ValueError(f"{where}.role={role!r} is unknown: expected one of {', '.join(ROLES)}")
    if role == "system" and position > 0:
        raise ValueError(f"{where}.role='system': expected a system message only at the start")
    # Only what the model has to write must be there: an empty system or user turn is legal in the chat template.
    content = text_field(fields, "content", where, empty=role != "assistant")
    thoughts = None
    if fields.get("reasoning_content") not in (None, ""):
        if role != "assistant":
            raise ValueError(f"{where}.reasoning_content on role {role!r}: expected it on 'assistant' only")
        thoughts = text_field(fields, "reasoning_content", where)
    return Message(role, content, thoughts)


def _parse_problem(fields):
    if "messages" in fields:
        messages = parse_messages(fields["messages"])
        if messages[-1].role != "user":
            raise ValueError(f"the last message has role {messages[-1].role!r}: expected 'user', whom to answer")
    else:
        messages = (Message("user", text_field(fields, "prompt")),)
    value, tests = fields.get("answer"), fields.get("tests") or []
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    elif value is not None:
        value = text_field(fields, "answer")
    if not isinstance(tests, list) or not all(isinstance(test, str) and test.strip() for test in tests):
        raise ValueError(f"tests={shown(tests)}: expected a list of Python programs, such as [\"assert f(1) == 2\"]")
    task_type = fields.get("task_type") or ("code" if tests else "math" if value is not None else "preference")
    if task_type not in TASK_TYPES:
        raise ValueError(f"task_type={shown(task_type)} is unknown: expected one of {', '.join(TASK_TYPES)}")
    for needed, missing in (("math", value is None), ("code", not tests)):
        if task_type == needed and missing:
            raise ValueError(f"task_type={task_type} without {'tests' if needed == 'code' else 'answer'}: nothing to "
                             "verify an answer by")
    return Example((*messages, Message("assistant", "")), value, tuple(tests), task_type)


def _parse_gsm8k(fields, dress):
    question = text_field(fields, "question")
    rationale, mark, final = text_field(fields, "answer").rpartition("####")
    if not mark:
        raise ValueError("answer without '####': expected a rationale, then '#### n' with the final number")
    value = final.strip().replace(",", "").removeprefix("$")
    if not NUMBER.fullmatch(value):
        raise ValueError(f"final answer {shown(final.strip())}: expected a number after '####'")
    equations = [equation.replace(" ", "") for equation in ANNOTATION.findall(rationale)]
    answer = "\n".join([*equations, f"#### {value}"])
    return dress_example(question, ANNOTATION.sub("", rationale).strip(), answer, value, dress)


def text_field(fields, key, where="", empty=False):
    """The string at a key; ValueError where it is missing, of another type, not Unicode, or, unless empty, blank."""
    name = f"{where}.{key}" if where else key
    if key not in fields:
        raise ValueError(f"missing key {name!r}: expected a string")
    text = fields[key]
    if not isinstance(text, str):
        raise ValueError(f"{name}={shown(text)}: expected a string")
    if not empty and not text.strip():
        raise ValueError(f"{name} is empty: expected some text")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair, "\ud83d", which no tokenizer can encode
        raise ValueError(f"{name} holds half of a surrogate pair: expected valid Unicode") from None
    return text


def shown(value):
    """A value for an error message, at most 60 characters."""
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _read_records(paths, parse, on_error):
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error={on_error!r}: expected 'raise' or 'skip'.")
    paths = [paths] if isinstance(paths, (str, Path)) else paths
    records, errors = [], []
    for path in map(Path, paths):
        for line_number, line in read_lines(path):
            try:
                records.append(parse(parse_line(path, line)))
            except ValueError as error:
                message = f"{path}:{line_number}: {error}"
                if on_error == "raise":
                    raise ValueError(message) from None
                errors.append(message)
    return records, errors


def read_lines(path):
    """Yields (line number, bytes) of the lines of a file that are not blank; a .txt file is one line.

    Holds a line at a time. Raises ValueError for a file of none of TEXT_FILES, one that cannot be decompressed, is cut
    off or holds nothing, and for a line of more than 256 MiB.
    """
    path, is_empty = Path(path), True
    for line_number, line in enumerate(_split_lines(path), start=1):
        if line.strip():
            is_empty = False
            yield line_number, line
    if is_empty:
        raise ValueError(f"{path}: the file is empty: expected at least one record.")


def parse_line(path, line):
    """The object of a line of a file; a .txt file's is {"text": its content}. ValueError says what is malformed."""
    try:
        text = line.removeprefix(codecs.BOM_UTF8).decode()  # "utf-8-sig" takes three times as long
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}: expected UTF-8 text") from None
    if str(path).endswith(".txt"):
        return {"text": text}
    try:
        fields = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        raise ValueError(f"not JSON ({reason}): expected one JSON object a line") from None
    if not isinstance(fields, dict):
        raise ValueError(f"a JSON {type(fields).__name__}, not an object: expected one JSON object a line")
    return fields


def _split_lines(path):
    end, parts, num_bytes = b"" if path.suffix == ".txt" else b"\n", [], 0
    for chunk in _read_chunks(path):
        first, *others = chunk.split(end) if end else [chunk]
        parts.append(first)
        num_bytes += len(first)
        if num_bytes > _MAX_LINE_BYTES:
            raise ValueError(f"{path}: a line of more than {_MAX_LINE_BYTES >> 20} MiB: expected one record a line.")
        if others:
            yield b"".join(parts)
            yield from others[:-1]
            parts, num_bytes = [others[-1]], len(others[-1])
    yield b"".join(parts)


def _read_chunks(path):
    if not path.name.endswith(TEXT_FILES):
        raise ValueError(f"{path}: unknown kind of file: expected {', '.join(TEXT_FILES[:-1])} or {TEXT_FILES[-1]}.")
    try:
        with open(path, "rb") as file:
            if path.suffix == ".zst":
                yield from _decompress_zstandard(file)
            else:
                source = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file
                while chunk := source.read(_CHUNK_BYTES):
                    yield chunk
    except (gzip.BadGzipFile, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise ValueError(f"{path}: cannot be decompressed ({error}): fetch or write the file again.") from None


def _decompress_zstandard(file):
    # zstandard's stream reader ends in silence where a file was cut off; a decompression object knows whether it
    # reached the end of its frame. A file may hold several frames.
    frame = None
    while data := file.read(_ZSTD_CHUNK_BYTES):
        while data:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(data)
            data = frame.unused_data
            if frame.eof:
                frame = None
    if frame is not None:
        raise EOFError("the last frame is cut off")
