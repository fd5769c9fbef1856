"""Oracles: mindformers' own IndexedDataset, and bytes put together by hand."""

import errno
import importlib.util
import logging
import os
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindpangu.data.megatron import read_megatron, write_megatron

DOCUMENTS = [[1, 2, 3], [153_375], [0, 70_000, 5, 7]]
TOKENS = struct.pack("<8i", 1, 2, 3, 153_375, 0, 70_000, 5, 7)


def index_bytes(code=4, lengths=(3, 1, 4), pointers=(0, 12, 16), documents=(0, 1, 2, 3), version=1,
                magic=b"MMIDIDX\x00\x00"):
    return (magic + struct.pack("<QBQQ", version, code, len(lengths), len(documents))
            + struct.pack(f"<{len(lengths)}i", *lengths) + struct.pack(f"<{len(pointers)}q", *pointers)
            + struct.pack(f"<{len(documents)}q", *documents))


def write_by_hand(prefix, tokens=TOKENS, **index):
    prefix.with_suffix(".bin").write_bytes(tokens)
    prefix.with_suffix(".idx").write_bytes(index_bytes(**index))
    return prefix


def documents_of(prefix):
    data = read_megatron(prefix)
    return [data.document(d).tolist() for d in range(data.num_documents)]


def test_the_files_are_these_bytes(tmp_path):
    by_hand = write_by_hand(tmp_path / "hand")
    write_megatron(tmp_path / "a", (np.array(document) for document in DOCUMENTS))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / "a").with_suffix(suffix).read_bytes() == by_hand.with_suffix(suffix).read_bytes()
    assert documents_of(by_hand) == DOCUMENTS


def test_documents_of_several_sequences_and_of_none_are_read(tmp_path):
    write_by_hand(tmp_path / "a", documents=(0, 2, 2, 3))
    assert documents_of(tmp_path / "a") == [[1, 2, 3, 153_375], [], [0, 70_000, 5, 7]]
    # Sequences may share tokens, or stand in another order than their documents.
    write_by_hand(tmp_path / "a", lengths=(4, 3, 2), pointers=(16, 0, 4))
    assert documents_of(tmp_path / "a") == [[0, 70_000, 5, 7], [1, 2, 3], [2, 3]]


@pytest.fixture
def mindformers_file(monkeypatch):
    """mindformers' module, from its file: all that it takes of the package, which needs 5 s or more, is the logger."""
    logger = SimpleNamespace(logger=logging.getLogger("mindformers"))
    monkeypatch.setitem(sys.modules, "mindformers.tools.logger", logger)
    folder = Path(importlib.util.find_spec("mindformers").origin).parent / "dataset" / "blended_datasets"
    spec = importlib.util.spec_from_file_location("indexed_dataset", folder / "indexed_dataset.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_mindformers_reads_what_is_written(tmp_path, mindformers_file):
    rng = np.random.default_rng(0)
    for name, dtype, documents in (
        ("small", "uint16", [rng.integers(0, 65_536, length) for length in rng.integers(1, 200, 300)]),
        ("large", "int32", [rng.integers(0, 153_376, length) for length in (1, 1_000_000, 7)]),
    ):
        write_megatron(tmp_path / name, documents, dtype)
        for mmap in (True, False):
            data = mindformers_file.IndexedDataset(str(tmp_path / name), mmap=mmap)
            assert [data[i].tolist() for i in range(len(data))] == [document.tolist() for document in documents]
            assert data.document_indices.tolist() == list(range(len(documents) + 1)) and data[0].dtype == dtype
        assert documents_of(tmp_path / name) == [document.tolist() for document in documents]


@pytest.mark.parametrize("dtype", [np.int32, np.uint16])
def test_what_mindformers_writes_is_read(tmp_path, mindformers_file, dtype):
    builder = mindformers_file.IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype)
    builder.add_document(np.array([5, 6, 65_499, 0, 1, 2], dtype), [2, 1, 3])
    builder.add_document(np.array([9], dtype), [1])
    builder.add_item(np.array([8, 7], dtype))
    builder.end_document()
    builder.finalize(str(tmp_path / "a.idx"))
    assert documents_of(tmp_path / "a") == [[5, 6, 65_499, 0, 1, 2], [9], [8, 7]]
    assert read_megatron(tmp_path / "a").lengths_S.tolist() == [2, 1, 3, 1, 2]


@settings(deadline=None, max_examples=50)
@given(data=st.data(), dtype=st.sampled_from(["uint8", "int8", "int16", "int32", "int64", "uint16"]))
def test_documents_come_back_in_every_type(tmp_path_factory, data, dtype):
    bounds = np.iinfo(dtype)
    documents = data.draw(st.lists(st.lists(st.integers(int(bounds.min), int(bounds.max)), min_size=1), min_size=1))
    prefix = tmp_path_factory.mktemp("types") / "a.b"
    write_megatron(prefix, [np.array(document) for document in documents], dtype)
    assert documents_of(prefix) == documents
    assert sorted(path.name for path in prefix.parent.iterdir()) == ["a.b.bin", "a.b.idx"]


@pytest.mark.parametrize(("documents", "dtype", "reason"), [
    ([[1], [70_000]], "uint16", "document 1 has token ids from 70000 to 70000: uint16 holds 0 to 65535"),
    ([[-1]], "uint16", "document 0 has token ids from -1 to -1"),
    ([[1], []], "int32", r"document 1 has shape \(0,\)"),
    ([[[1, 2]]], "int32", r"document 0 has shape \(1, 2\)"),
    ([[0.5]], "int32", "type float64: expected one row"),
    ([], "int32", "no documents to write"),
    ([[1]], "float32", "dtype='float32': expected one of uint8, int8, int16, int32, int64, uint16"),
])
def test_what_cannot_be_written_is_refused_and_leaves_what_was_there(tmp_path, documents, dtype, reason):
    write_megatron(tmp_path / "a", [[4, 2]])
    with pytest.raises(ValueError, match=reason):
        write_megatron(tmp_path / "a", documents, dtype)
    assert documents_of(tmp_path / "a") == [[4, 2]] and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(("change", "reason"), [
    ({"magic": b"TNTIDX\x00\x00\x00"}, r"a.idx: .*expected an index that starts with b'MMIDIDX"),
    ({"version": 2}, "a.idx: version 2, type 4: expected version 1"),
    ({"code": 7}, r"type 7: expected .* 4 \(int32\), 5 \(int64\), 8 \(uint16\)"),
    ({"code": 99}, "type 99"),
    ({"documents": (0, 1, 2)}, "a.idx: the documents' boundaries do not go from 0 to 3"),
    ({"documents": (1, 2, 3)}, "boundaries"),
    ({"documents": (0, 2, 1, 3)}, "boundaries"),
    ({"documents": ()}, "boundaries"),
    ({"lengths": (3, 1, -4)}, "negative length or place"),
    ({"pointers": (-4, 12, 16)}, "negative length or place"),
    ({"pointers": (0, 13, 16)}, "negative length or place"),
    ({"code": 8}, "a.bin: 32 bytes, expected the 12 tokens of 2 bytes"),
    ({"lengths": (3, 1, 5)}, "a.bin: 32 bytes, expected the 9 tokens of 4 bytes that a.idx has"),
    ({"tokens": b""}, "a.bin: 0 bytes, expected the 8 tokens"),
    ({"lengths": (3, 1, 4, 0)}, r"a.idx: \d+ bytes, expected \d+ for 4 sequences in 3 documents: cut off"),
])
def test_files_that_are_not_a_whole_pair_are_refused_by_name(tmp_path, change, reason):
    write_by_hand(tmp_path / "a", **change)
    with pytest.raises(ValueError, match=reason):
        read_megatron(tmp_path / "a")


def test_an_index_that_is_cut_off_anywhere_is_refused(tmp_path):
    whole = write_by_hand(tmp_path / "a").with_suffix(".idx").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "a.idx").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="a.idx"):
            read_megatron(tmp_path / "a")


def test_a_full_disk_names_the_file_and_leaves_no_part_of_it(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("mounting a small tmpfs is not permitted here")
    try:
        write_megatron(tmp_path / "a", [[4, 2]])
        with pytest.raises(OSError, match=r"No space left on device .*a\.bin") as error:
            write_megatron(tmp_path / "a", (np.arange(1000) for _ in range(1000)))
        assert error.value.errno == errno.ENOSPC
        assert documents_of(tmp_path / "a") == [[4, 2]] and len(list(tmp_path.iterdir())) == 2
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_writer_that_ends_between_the_two_files_leaves_no_index_of_other_tokens(tmp_path, monkeypatch):
    write_megatron(tmp_path / "a", [[4, 2]])
    replace = os.replace

    def replace_tokens_only(source, target):
        if Path(target).suffix == ".idx":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_tokens_only)
    with pytest.raises(KeyboardInterrupt):
        write_megatron(tmp_path / "a", [[2, 4]])  # as long: lengths alone would not tell
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]
