"""Oracles: records written by hand and by pyarrow, and Python's own reading of them."""

import datetime
import decimal
import gzip
import json
import re
import tracemalloc
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from mindpangu.data.sources import (
    Document,
    Malformed,
    Source,
    detect_language,
    list_files,
    normalize_text,
    read_sources,
    record_text,
    script_shares,
)

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def write(path, *records):
    content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pack(content))
    return str(path)


def write_parquet(path, columns, **options):
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table(columns), path, **options)
    return str(path)


def texts(*paths, **options):
    return [document.text for document in read_sources([Source("s", paths, **options)])]


def test_a_document_says_where_it_comes_from_and_keeps_its_record(tmp_path):
    chat = {"messages": [{"role": "user", "content": "Was ist 1+1?"},
                         {"role": "assistant", "content": "2", "reasoning_content": "One and one."}], "id": 7}
    plain = {"text": "中文 😀\r\n第二行 "}
    chats, documents = write(tmp_path / "a.jsonl", chat), write(tmp_path / "b.jsonl.zst", plain)
    sources = [Source("chats", (chats,), "de", "reasoning", "CC0"), Source("web", (documents,))]
    assert list(read_sources(sources)) == [
        Document("Was ist 1+1?\nOne and one.\n2", chat, "chats", "de", "reasoning", "CC0", chats, 1),
        Document("中文 😀\n第二行", plain, "web", "zh", None, None, documents, 1),
    ]


@pytest.mark.parametrize(("record", "fields", "text"), [
    ({"question": "Q", "answer": "A\n#### 1", "text": "unused"}, (), "Q\nA\n#### 1"),
    ({"prompt": "Q", "answer": 42}, (), "Q\n42"),
    ({"prompt": "Q", "tests": ["assert f()"]}, (), "Q"),
    ({"instruction": "Q", "input": "", "output": "A"}, (), "Q\nA"),
    ({"instruction": "Q", "output": "A"}, (), "Q\nA"),
    ({"text": "Q", "code": "A"}, (), "Q"),
    ({"text": "Q", "code": "A", "test_list": ["t1", "t2"], "none": None}, ("text", "code", "none", "test_list"),
     "Q\nA\nt1\nt2"),
    ({"turns": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}, ("turns",), "Q\nA"),
])
def test_text_is_that_of_the_known_or_the_named_fields(record, fields, text):
    assert record_text(record, fields) == text


@pytest.mark.parametrize(("record", "fields", "reason"), [
    ({"txt": "x"}, (), r"keys \['txt'\]: expected messages; or question, answer; .* name them in the source's fields"),
    ({"text": "x"}, ("text", "code"), "missing key 'code': expected the source's fields text, code"),
    ({"text": 3 == 3}, (), "text=True: expected a string, a number"),
    ({"text": {"a": 1}}, (), "expected a string, a number"),
    ({"text": ["a", 1]}, (), "expected a string, a number"),
    ({"text": ""}, (), "text is empty"),
    ({"text": " \r\n\t"}, (), "text is empty"),
    ({"messages": []}, (), "messages is empty"),
    ({"messages": [{"role": "bot", "content": "x"}]}, (), r"messages\[0\].role='bot' is unknown"),
    ({"turns": [{"role": "user"}]}, ("turns",), r"missing key 'turns\[0\].content'"),
    ({"text": "\ud83d"}, (), "half of a surrogate pair"),
])
def test_a_record_without_text_says_what_was_expected(record, fields, reason):
    with pytest.raises(ValueError, match=reason):
        record_text(record, fields)


def test_malformed_lines_are_told_by_file_and_line_or_handed_over(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n{"text": \n{"text": "caf\xe9"}\n[1]\n{"text": "two"}\n{"text": ""}')
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}:3: not JSON"):
        list(read_sources([Source("s", (str(path),))]))
    found = []
    documents = list(read_sources([Source("s", (str(path),))], found.append))
    assert [(document.text, document.line) for document in documents] == [("one", 1), ("two", 6)]
    assert [item[:3] for item in found] == [("s", str(path), line) for line in (3, 4, 5, 7)]
    assert isinstance(found[0], Malformed) and "not UTF-8 at byte 13" in found[1].reason and "list" in found[2].reason


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("num_records", [1, 2000])
def test_a_file_that_is_cut_off_is_refused_even_where_malformed_lines_are_not(tmp_path, name, num_records):
    records = [{"text": f"{number} {number ** 20}"} for number in range(num_records)]
    path = Path(write(tmp_path / name, *records))
    whole = path.read_bytes()
    assert texts(str(path)) == [record["text"] for record in records]
    for length in (len(whole) - 1, len(whole) // 2, 3):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"{name}: cannot be decompressed .*fetch or write the file again"):
            list(read_sources([Source("s", (str(path),))], lambda malformed: None))


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", b""), ("a.jsonl", b"\n \n"), ("a.jsonl.gz", b""),
                                               ("a.jsonl.zst", zstandard.compress(b"\n"))])
def test_an_empty_file_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: the file is empty"):
        list(read_sources([Source("s", (str(tmp_path / name),))], lambda malformed: None))


def test_long_nul_and_emoji_documents_arrive_whole_from_every_kind_of_file(tmp_path):
    records = [{"text": "a\0b\0"}, {"text": "👨‍👩‍👧 x²"}, {"text": "漢字かな " * 200_000 + "."},
               {"text": "{" * 1_000_000}]
    paths = [write(tmp_path / f"a.jsonl{suffix}", *records) for suffix in ("", ".gz", ".zst")]
    paths.append(write_parquet(tmp_path / "a.parquet", {"text": [record["text"] for record in records]}))
    for path in paths:
        documents = list(read_sources([Source("s", (path,))]))
        assert [document.record for document in documents] == records
        assert [document.text for document in documents] == [record["text"] for record in records]
        assert [document.language for document in documents] == ["en", "en", "ja", "und"]


def test_folders_and_globs_give_each_known_file_once_in_order(tmp_path):
    names = ["b/z.jsonl", "b/deep/a.jsonl.gz", "a.jsonl", "c.parquet", "notes.txt"]
    for name in ("b/z.jsonl", "b/deep/a.jsonl.gz", "a.jsonl"):
        write(tmp_path / name, {"text": name})
    write_parquet(tmp_path / "c.parquet", {"text": ["c.parquet"]})
    (tmp_path / "notes.txt").write_text("notes.txt")
    for other in ("README.md", "a.jsonl.partial", ".hidden.jsonl", ".cache/x.jsonl"):
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).write_text("no record")
    assert texts(str(tmp_path)) == sorted(names, key=lambda name: Path(name).parts)
    assert texts(f"{tmp_path}/**/*.jsonl*") == ["a.jsonl", "b/deep/a.jsonl.gz", "b/z.jsonl"]
    assert texts(f"{tmp_path}/b/z.jsonl", f"{tmp_path}/b") == ["b/z.jsonl", "b/deep/a.jsonl.gz"]
    write(tmp_path / "odd[1].jsonl", {"text": "odd"})
    assert texts(f"{tmp_path}/odd[1].jsonl") == ["odd"], "a file's own name is no glob"
    for alone in (str(tmp_path / "a.jsonl"), tmp_path / "a.jsonl", f"{tmp_path}/a.json*"):
        assert [document.text for document in read_sources([Source("s", alone)])] == ["a.jsonl"]


def test_paths_without_files_and_repeated_names_are_refused_before_anything_is_read(tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "x"})
    (tmp_path / "README.md").write_text("x")
    (tmp_path / "empty").mkdir()
    for wrong, reason in (("absent.jsonl", "no file at .*absent.jsonl"), ("empty", "no file at .*empty"),
                          ("*.parquet", "no file at"), ("README.md", "README.md: unknown kind of file")):
        with pytest.raises(ValueError, match=f"source 'web': .*{reason}"):
            read_sources([Source("a", (path,)), Source("web", (str(tmp_path / wrong),))])
    with pytest.raises(ValueError, match="'web' has no paths"):
        list_files(Source("web", ()))
    with pytest.raises(ValueError, match="several sources are named 'a'"):
        read_sources([Source("a", (path,)), Source("a", (path,))])


def test_parquet_rows_are_records(tmp_path):
    user = {"role": "user", "content": "q", "reasoning_content": None}
    rows = [{"text": f"文 {row}", "score": row / 2, "tags": ["x", None],
             "messages": [user, {"role": "assistant", "content": f"a{row}", "reasoning_content": "t"}]}
            for row in range(1000)]
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    path = write_parquet(tmp_path / "a.parquet", columns, row_group_size=300)
    documents = list(read_sources([Source("s", (path,))]))
    assert [document.record for document in documents] == rows
    assert [document.line for document in documents] == list(range(1, 1001))
    assert documents[999].text == "q\nt\na999"


def test_parquet_times_and_decimals_become_strings_and_bytes_are_refused_by_column(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"text": ["x"], "day": [datetime.date(2024, 5, 6)],
                                                  "price": [decimal.Decimal("1.50")]})
    [document] = read_sources([Source("s", (path,))])
    assert document.record == {"text": "x", "day": "2024-05-06", "price": "1.50"}
    path = write_parquet(tmp_path / "a.parquet", {"text": ["x"], "images": [[b"\xff"]]})
    with pytest.raises(ValueError, match=r"a.parquet: column 'images' has type list<.*binary>, which JSON cannot hold"):
        texts(path)


def test_a_parquet_row_that_is_no_unicode_is_an_error_of_that_row(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    column = pa.array([b"one", b"caf\xe9", b"two"], pa.binary()).view(pa.string())
    parquet.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    path, found = str(tmp_path / "a.parquet"), []
    documents = list(read_sources([Source("s", (path,))], found.append))
    assert [(document.text, document.line) for document in documents] == [("one", 1), ("two", 3)]
    assert [item[:3] for item in found] == [("s", path, 2)]


def test_parquet_files_that_are_cut_off_or_empty_are_refused(tmp_path):
    path = Path(write_parquet(tmp_path / "a.parquet", {"text": ["some text"] * 100}))
    whole = path.read_bytes()
    for content in (whole[:-4], whole[: len(whole) // 2], b"", b"text"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="a.parquet: cannot be read as Parquet"):
            texts(str(path))
    with pytest.raises(ValueError, match="a.parquet: the file is empty"):
        texts(write_parquet(path, {"text": []}))


def test_without_pyarrow_the_error_names_the_extra(tmp_path, request):
    path = write_parquet(tmp_path / "a.parquet", {"text": ["x"]})
    request.getfixturevalue("without_pyarrow")
    with pytest.raises(ImportError, match=r"a.parquet: .* pip install 'mindpangu\[curate\]'"):
        texts(path)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_memory_does_not_grow_with_the_file(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    digits = np.random.default_rng(0).integers(ord("0"), ord("9") + 1, (1600, 10_000), np.uint8)
    lines = b"".join(b'{"text": "%s"}\n' % row.tobytes() for row in digits)  # 16 MB, 7 compressed
    pack = {".gz": lambda data: gzip.compress(data, 1), ".zst": zstandard.compress}.get(suffix, bytes)
    path.write_bytes(pack(lines))
    texts(write(tmp_path / "warm.jsonl", {"text": "the table of scripts"}))
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_sources([Source("s", (str(path),))])) == 1600
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


@settings(deadline=None)
@given(st.text())
def test_normalising_twice_is_normalising_once_and_keeps_every_visible_character(text):
    normalised = normalize_text(text)
    assert normalize_text(normalised) == normalised == unicodedata.normalize("NFC", normalised)
    assert "".join(normalised.split()) == "".join(unicodedata.normalize("NFC", text).split())


def test_normalising_keeps_what_mathematics_and_programs_mean():
    assert normalize_text("\r\n\nx² ½ ﬁ\r  if x:\t\n\tcafe\u0301\0 \n\n") == "x² ½ ﬁ\n  if x:\n\tcafé\0"
    assert len(normalize_text(" " * 1_000_000 + "x")) == 1_000_001  # linear in runs of white space


SAMPLES = {
    "en": ["To be or not to be.", "Où est la bibliothèque ?", "3 km", "The word 中 means middle in Chinese."],
    "zh": ["今天天气很好。", "求函数 $f(x)=\\frac{1}{x}$ 的最小值。", "使用 Python 编写函数 sort_list 排序", "𠀀𠀁"],
    "ja": ["今日は天気がいいです。", "カタカナ"],
    "ko": ["오늘 날씨가 좋습니다.", "大韓民國 만세 대한독립"],
    "ru": ["Сегодня хорошая погода"], "ar": ["الطقس جميل اليوم"], "hi": ["आज मौसम अच्छा है"], "el": ["Καλημέρα"],
    "he": ["שלום"], "th": ["สวัสดี"],
    "und": ["", "1 + 1 = 2", "😀🎉", "\0\0", "გამარჯობა"],
}


@pytest.mark.parametrize(("language", "text"), [(language, text) for language in SAMPLES for text in SAMPLES[language]])
def test_language_is_that_of_the_script(language, text):
    assert detect_language(text) == language


@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8")))
def test_script_shares_are_those_of_the_letters_unicode_names_so(text):
    words = {"LATIN": "latin", "CJK": "han", "HIRAGANA": "kana", "KATAKANA": "kana", "HANGUL": "hangul",
             "CYRILLIC": "cyrillic", "ARABIC": "arabic", "GREEK": "greek", "HEBREW": "hebrew", "THAI": "thai",
             "DEVANAGARI": "devanagari"}
    # Unicode's blocks that hold nearly all of a script; what lies outside, such as Coptic's or medieval letters, may
    # be told as "other".
    letters = [c for c in text if unicodedata.category(c)[0] == "L"]
    shares = script_shares(text)
    assert bool(shares) == bool(letters) and (not shares or abs(sum(shares.values()) - 1) < 1e-9)
    common = [c for c in letters if ord(c) < 0x600 or 0x4E00 <= ord(c) < 0xA000 or 0xAC00 <= ord(c) < 0xD7A4]
    for script in set(words.values()):
        named = sum(words.get(unicodedata.name(c).split()[0]) == script for c in common)
        assert round(shares.get(script, 0) * len(letters)) >= named


@pytest.mark.skipif(not DATA.is_dir(), reason="the data sets are not here")
def test_the_real_data_sets_are_sources():
    sources = [Source("gsm8k", (str(DATA / "gsm8k" / "train.jsonl"),), category="reasoning"),
               Source("mbpp", (str(DATA / "mbpp" / "mbpp.jsonl"),), fields=("text", "code", "test_list")),
               Source("math500", (f"{DATA}/math500/*.jsonl",)), Source("ifeval", (f"{DATA}/ifeval/*.jsonl",)),
               Source("humaneval", (f"{DATA}/humaneval/*.gz",), fields=("prompt", "canonical_solution"))]
    counts = {}
    for document in read_sources(sources):
        assert document.text and document.language == "en"
        counts[document.source] = counts.get(document.source, 0) + 1
    # The counts of the papers that published them.
    assert counts == {"gsm8k": 7473, "mbpp": 974, "math500": 500, "ifeval": 541, "humaneval": 164}
