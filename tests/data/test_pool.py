"""Oracle: the reader of sources itself, and the files as written."""

import json
import multiprocessing
import os
import pickle

import numpy as np
import pytest

from mindpangu.data import pool as pool_module
from mindpangu.data.dedup import content_key
from mindpangu.data.pool import Pool, TextBytes, json_line, write_pool
from mindpangu.data.sources import Source, read_sources

TEXTS = ["one", "中文，两行\n第二行", "😀 emoji 👩‍👩‍👧", "a\0b", "x" * 1_000_000, "é composed", "é composed", " last "]


@pytest.fixture
def sources(tmp_path):
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_bytes(b"".join(json_line({"text": text, "n": n}) for n, text in enumerate(TEXTS[:4])))
    lines = [json_line({"text": text}) for text in TEXTS[4:]]
    second.write_bytes(b"".join([*lines, b'{"text": "half \\ud83d"}\n{"text": 1']))
    return [Source("web", (str(first),), category="general", licence="CC0"), Source("books", (str(second),), "en")]


def test_documents_come_back_as_the_sources_gave_them(tmp_path, sources):
    counts = []
    pool = write_pool(tmp_path / "pool", sources, skip_malformed=True, on_progress=counts.append)
    malformed = []
    expected = list(read_sources(sources, malformed.append))
    for found in (pool, Pool(tmp_path / "pool"), pickle.loads(pickle.dumps(pool))):
        assert [found.document(number) for number in range(len(found))] == expected
    assert pool.num_malformed == len(malformed) == 2
    lines = (tmp_path / "pool" / "malformed.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [one._asdict() for one in malformed]
    assert pool.char_counts_N.tolist() == [len(document.text) for document in expected]
    assert [key.tobytes() for key in pool.keys_N2] == [content_key(document.text) for document in expected]
    assert (pool.keys_N2[5] == pool.keys_N2[6]).all(), "normalised texts are compared"
    assert [text.decode() for text in TextBytes(pool, np.array([6, 1]))] == [expected[6].text, expected[1].text]


@pytest.mark.parametrize("limit", ["_BATCH_RECORDS", "_BATCH_BYTES"])
def test_many_documents_are_read_in_batches(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(pool_module, limit, 7)
    path = tmp_path / "many.txt.jsonl"
    path.write_text("".join(f'{{"text": "document {n}"}}\n' for n in range(50)), encoding="utf-8")
    pool = write_pool(tmp_path / "pool", [Source("many", str(path))])
    assert [pool.text(number) for number in range(50)] == [f"document {number}" for number in range(50)]
    assert [pool.place(number)[1] for number in range(50)] == list(range(1, 51))


def test_a_malformed_line_ends_the_reading_and_leaves_no_pool(tmp_path, sources):
    with pytest.raises(ValueError, match=r"b\.jsonl:5: text holds half of a surrogate pair"):
        write_pool(tmp_path / "pool", sources)
    assert os.listdir(tmp_path / "pool") == []
    with pytest.raises(ValueError, match="no pool of documents"):
        Pool(tmp_path / "pool")


def test_nothing_but_malformed_lines_is_an_error(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": 1\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"no document is left of 1 malformed ones, see .*malformed\.jsonl"):
        write_pool(tmp_path / "pool", [Source("a", str(path))], skip_malformed=True)
    assert json.loads((tmp_path / "pool" / "malformed.jsonl").read_text(encoding="utf-8"))["line"] == 1


@pytest.mark.parametrize("size", [0, 5, 8])
def test_what_is_cut_off_is_noticed(tmp_path, sources, size):
    pool = write_pool(tmp_path / "pool", sources, skip_malformed=True)
    os.truncate(tmp_path / "pool" / "texts.bin", size)
    with pytest.raises(ValueError, match=r"texts\.bin is cut off: delete the folder"):
        pool.text(len(pool) - 1)
    os.truncate(tmp_path / "pool" / "text_ends.bin", size)
    with pytest.raises(ValueError, match=r"text_ends\.bin is cut off: delete the folder"):
        Pool(tmp_path / "pool")


def read_in_child(pool, queue):
    queue.put(pool.text(2))


def test_another_process_reads_the_same_files_under_another_working_folder(tmp_path, sources, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pool = write_pool("pool", sources, skip_malformed=True)
    data = pickle.dumps(pool)
    monkeypatch.chdir("/")
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=read_in_child, args=(pickle.loads(data), queue))
    process.start()
    assert queue.get(timeout=60) == TEXTS[2]
    process.join()
