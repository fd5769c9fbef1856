"""Responses on disk: whole lines or none, for several writers."""

import json
import subprocess
import sys

import pytest

from mindpangu.benchmarks.responses import ResponseFile, request_key


def test_responses_are_there_after_a_restart(tmp_path):
    path = tmp_path / "new" / "responses.jsonl"
    first = ResponseFile(path)
    assert len(first) == 0 and first.get("a") is None
    first.add({"a": [1, 2, 3], "b": [-1.25, True]})
    first.add({"c": [-0.1, False]})
    again = ResponseFile(path)
    assert [again.get(key) for key in "abc"] == [[1, 2, 3], [-1.25, True], [-0.1, False]] and len(again) == 3


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_what_a_kill_cut_off_is_dropped_and_written_anew(tmp_path, cut):
    path = tmp_path / "responses.jsonl"
    ResponseFile(path).add({"a": [1], "b": [2]})
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    found = ResponseFile(path)
    assert (found.get("a"), found.get("b")) == ([1], None)
    found.add({"b": [2]})
    assert path.read_bytes() == whole


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "responses.jsonl"
    path.write_text('{"key": "a", "response": [1]}\n{"other": 1}\n')
    with pytest.raises(ValueError, match=r"responses.jsonl:2 is no response: delete the file"):
        ResponseFile(path)


def test_two_processes_write_into_one_file(tmp_path):
    path = tmp_path / "responses.jsonl"
    program = ("import sys; from mindpangu.benchmarks.responses import ResponseFile; file = ResponseFile(sys.argv[1])\n"
               "for i in range(100): file.add({f'{sys.argv[2]}-{i}-{j}': [i, j] for j in range(3)})")
    writers = [subprocess.Popen([sys.executable, "-c", program, path, name]) for name in ("x", "y")]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert len(ResponseFile(path)) == 600
    assert all(json.loads(line)["key"] for line in path.read_text().splitlines())


def test_keys_differ_by_kind_and_every_part():
    keys = {request_key("generate_until", [1, 2], ["x"], 8), request_key("loglikelihood", [1, 2], ["x"], 8),
            request_key("generate_until", [1, 2, 3], ["x"], 8), request_key("generate_until", [1, 2], [], 8),
            request_key("generate_until", [1, 2], ["x"], 9)}
    assert len(keys) == 5 and request_key("a", 1) == request_key("a", 1)
