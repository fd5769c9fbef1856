"""Oracle: hand-written files and what they say."""
import gzip
import json
import re
from pathlib import Path

import pytest
import zstandard

from mindpangu.data.documents import Example, Message, read_chats, read_documents, read_gsm8k, read_problems

GSM8K = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "gsm8k"
CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}


def write(path, *lines):
    lines = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_chat_lines_become_examples(tmp_path):
    path = write(
        tmp_path / "chats.jsonl",
        {"messages": [{"role": "system", "content": ""}, {"role": "user", "content": "1+1?"},
                      {"role": "assistant", "content": "2", "reasoning_content": "one and one"}],
         "value": "2", "id": 5},
        "",
        {"messages": [*CHAT["messages"], {"role": "tool", "content": "{}"}, {"role": "function", "content": "f"},
                      {"role": "assistant", "content": "好", "reasoning_content": None}]},
    )
    examples, errors = read_chats([path])
    assert errors == []
    assert examples == [
        Example((Message("system", ""), Message("user", "1+1?"), Message("assistant", "2", "one and one")), "2"),
        Example((Message("user", "hi"), Message("assistant", "hello"), Message("tool", "{}"), Message("function", "f"),
                 Message("assistant", "好")), None),
    ]


def last(message):
    return {"messages": [CHAT["messages"][0], message]}


@pytest.mark.parametrize(("line", "reason"), [
    ('{"messages": [', r"not JSON \("),
    ("[" * 100000, "nested too deeply"),
    ("[1, 2]", "a JSON list, not an object"),
    ({"message": []}, "missing key 'messages'"),
    ({"messages": []}, r"messages=\[\]: expected a non-empty list"),
    ({"messages": "hi"}, "messages='hi': expected a non-empty list"),
    ({"messages": ["hi"]}, r"messages\[0\]='hi': expected an object"),
    (last({"role": "bot", "content": "x"}), r"messages\[1\].role='bot' is unknown: expected one of system, user"),
    (last({"role": 3, "content": "x"}), r"messages\[1\].role=3: expected a string"),
    (last({"content": "x"}), r"missing key 'messages\[1\].role'"),
    (last({"role": "assistant"}), r"missing key 'messages\[1\].content'"),
    (last({"role": "assistant", "content": None}), r"messages\[1\].content=None: expected a string"),
    (last({"role": "assistant", "content": " \n"}), r"messages\[1\].content is empty"),
    (last({"role": "user", "content": "x"}), "the last message has role 'user': expected 'assistant'"),
    (last({"role": "system", "content": "x"}), "system message only at the start"),
    (last({"role": "assistant", "content": "x", "reasoning_content": 1}), "reasoning_content=1: expected a string"),
    ({"messages": [{"role": "user", "content": "x", "reasoning_content": "y"}]}, "expected it on 'assistant' only"),
    ({**CHAT, "value": 2}, "value=2: expected a string"),
    (last({"role": "assistant", "content": "\ud83d"}), "half of a surrogate pair"),
])
def test_malformed_chat_is_an_error_with_file_line_and_reason(tmp_path, line, reason):
    path = write(tmp_path / "bad.jsonl", CHAT, line, CHAT)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}:2: .*{reason}") as raised:
        read_chats([path])
    examples, errors = read_chats([path], on_error="skip")
    assert len(examples) == 2 and errors == [str(raised.value)]


def test_bytes_that_are_no_utf8_are_reported_by_line(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes(json.dumps(CHAT).encode() + b'\n{"text": "caf\xe9"}\n')
    with pytest.raises(ValueError, match="latin.jsonl:2: not UTF-8 at byte 13"):
        read_chats(path)


@pytest.mark.parametrize("on_error", ["raise", "skip"])
@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_empty_file_is_an_error(tmp_path, on_error, content):
    path = tmp_path / "empty.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="empty.jsonl: the file is empty"):
        read_chats([path], on_error=on_error)


def test_compressed_files_read_like_plain_ones_and_truncated_ones_are_refused(tmp_path):
    data = (json.dumps({"text": "x" * 100}) + "\n").encode() * 50
    frames = zstandard.compress(data) + zstandard.compress(data)  # files joined with cat hold several frames
    for name, packed, num_texts in (("a.jsonl.gz", gzip.compress(data), 50), ("a.jsonl.zst", frames, 100)):
        (tmp_path / name).write_bytes(packed)
        assert read_documents([tmp_path / name]) == (["x" * 100] * num_texts, [])
        (tmp_path / name).write_bytes(packed[:-9])
        with pytest.raises(ValueError, match=f"{name}: cannot be decompressed"):
            read_documents([tmp_path / name])
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name}: cannot be decompressed"):
            read_documents([tmp_path / name])


def test_documents_are_lines_of_jsonl_or_whole_text_files(tmp_path):
    lines = write(tmp_path / "a.jsonl", {"text": "one"}, {"text": "two\n三"})
    whole = write(tmp_path / "b.txt", "first line", "", "last line")
    assert read_documents([lines, whole]) == (["one", "two\n三", "first line\n\nlast line\n"], [])
    with pytest.raises(ValueError, match="a.jsonl:3: text is empty"):
        read_documents(write(lines, {"text": "one"}, {"text": "two"}, {"text": ""}))


def test_unknown_file_kind_and_unknown_mode_are_refused(tmp_path):
    with pytest.raises(ValueError, match="a.csv: unknown kind of file"):
        read_documents([write(tmp_path / "a.csv", "x")])
    with pytest.raises(ValueError, match="on_error='ignore'"):
        read_documents([write(tmp_path / "a.txt", "x")], on_error="ignore")
    with pytest.raises(FileNotFoundError):
        read_documents([tmp_path / "absent.txt"])


def test_gsm8k_line_is_split_into_thoughts_equations_and_value(tmp_path):
    path = write(tmp_path / "gsm8k.jsonl",
                 {"question": "How many?",
                  "answer": "48/2 = <<48/2=24>>24 clips.\nIn all $<<48 + 24=72>>72.\n#### 1,072"},
                 {"question": "None?", "answer": "None at all.\n#### 0"})
    question, value = Message("user", "How many?"), "1072"
    answer = "48/2=24\n48+24=72\n#### 1072"
    reasoning, fast, result = (read_gsm8k(path, dress)[0] for dress in ("reasoning", "fast", "result"))
    assert reasoning[0] == Example((question, Message("assistant", answer, "48/2 = 24 clips.\nIn all $72.")), value)
    assert fast[0] == Example((question, Message("assistant", answer)), value)
    assert result[0] == Example((question, Message("assistant", "#### 1072")), value)
    assert reasoning[1].messages[-1] == Message("assistant", "#### 0", "None at all.")


@pytest.mark.parametrize(("line", "reason"), [
    ({"question": "q"}, "missing key 'answer'"),
    ({"question": 1, "answer": "#### 2"}, "question=1: expected a string"),
    ({"question": "q", "answer": "it is 2"}, "answer without '####'"),
    ({"question": "q", "answer": "it is 2\n####"}, "final answer '': expected a number"),
    ({"question": "q", "answer": "#### two"}, "final answer 'two': expected a number"),
])
def test_malformed_gsm8k_line_is_an_error_with_file_line_and_reason(tmp_path, line, reason):
    path = write(tmp_path / "bad.jsonl", {"question": "q", "answer": "#### 2"}, line)
    with pytest.raises(ValueError, match=f"bad.jsonl:2: .*{reason}"):
        read_gsm8k([path], "fast")
    assert len(read_gsm8k([path], "fast", on_error="skip")[1]) == 1


@pytest.mark.skipif(not GSM8K.is_dir(), reason="GSM8K is not here")
def test_the_real_gsm8k_reads_without_an_error():
    train, errors = read_gsm8k([GSM8K / "train.jsonl"], "reasoning")
    heldout, _ = read_gsm8k([GSM8K / "test.jsonl"], "fast")
    assert (len(train), len(heldout), errors) == (7473, 1319, [])  # the counts of arXiv:2110.14168's published files
    assert train[0].value == "72" and train[0].messages[-1].content == "48/2=24\n48+24=72\n#### 72"
    assert not any("<<" in example.messages[-1].thoughts for example in train if example.messages[-1].thoughts)
    assert all(re.fullmatch(r"-?\d+(\.\d+)?", example.value) for example in train + heldout)


PROBLEMS = [
    {"prompt": "What is 6 * 7?", "answer": "42"},
    {"prompt": "What is 6 * 7?", "answer": 42, "task_type": "math"},
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Add."}], "answer": 1.5},
    {"prompt": "Write f.", "tests": ["assert f(1) == 2", "assert f(2) == 3"]},
    {"prompt": "Write f.", "tests": ["assert f(1) == 2"], "answer": "unused", "task_type": "code"},
    {"prompt": "Tell a story."},
]


def test_problems_get_their_verifier_from_what_they_hold(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(problem) + "\n" for problem in PROBLEMS))
    problems, errors = read_problems(path)
    assert not errors
    assert [problem.task_type for problem in problems] == ["math", "math", "math", "code", "code", "preference"]
    assert [problem.value for problem in problems] == ["42", "42", "1.5", None, "unused", None]
    assert problems[3].tests == ("assert f(1) == 2", "assert f(2) == 3")
    assert [message.role for message in problems[2].messages] == ["system", "user", "assistant"]
    assert all(problem.messages[-1] == Message("assistant", "") for problem in problems)


@pytest.mark.parametrize(("problem", "reason"), [
    ({"answer": "42"}, "missing key 'prompt'"),
    ({"prompt": " ", "answer": "42"}, "prompt is empty"),
    ({"prompt": "a", "answer": ["42"]}, "answer=.*expected a string"),
    ({"prompt": "a", "answer": True}, "answer=True: expected a string"),
    ({"prompt": "a", "tests": "assert f()"}, "tests=.*expected a list of Python programs"),
    ({"prompt": "a", "tests": [""]}, "tests=.*expected a list of Python programs"),
    ({"prompt": "a", "task_type": "poetry"}, "task_type='poetry' is unknown: expected one of math, code, preference"),
    ({"prompt": "a", "task_type": "math"}, "task_type=math without answer"),
    ({"prompt": "a", "answer": "1", "task_type": "code"}, "task_type=code without tests"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
     "last message has role 'assistant': expected 'user'"),
    ({"messages": []}, "messages=.*expected a non-empty list"),
])
def test_a_broken_problem_is_an_error_that_says_where_and_what(tmp_path, problem, reason):
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps(PROBLEMS[0]) + "\n" + json.dumps(problem) + "\n")
    with pytest.raises(ValueError, match=f"problems.jsonl:2: .*{reason}"):
        read_problems(path)
    problems, errors = read_problems(path, "skip")
    assert len(problems) == 1 and len(errors) == 1
