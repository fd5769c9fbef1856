"""Oracles: the documents that were packed, read back by pyarrow and by MindSpore's own readers."""

import os
import subprocess

import numpy as np
import pytest

from mindpangu.data.batches import PackedRows, tokenized_to_samples
from mindpangu.data.row_files import COLUMNS, write_mindrecord, write_parquet

PAD = 0


def packed_documents(lengths, seq_len=32, **options):
    """Rows of documents whose tokens say which and where they are; every third token is learnt."""
    tokenized = [(1000 * (number + 1) + np.arange(length), np.arange(length) % 3 == 2)
                 for number, length in enumerate(lengths)]
    rows = PackedRows(tokenized_to_samples(tokenized, options.pop("extras", None)), seq_len=seq_len, pad_id=PAD,
                      **{"micro_batch_rows": 1, **options})
    return tokenized, rows


def check_rows(rows, tokenized, seq_len=32):
    """Every document is in the rows once, with its own labels; what is left is padding."""
    wanted = {int(tokens[0]): (tokens, is_target) for tokens, is_target in tokenized}
    for row in rows:
        row = {column: np.asarray(row[column]) for column in COLUMNS}
        assert {array.dtype for array in row.values()} == {np.dtype("int32")}
        assert all(row[column].shape == (seq_len,) for column in COLUMNS[:4])
        start = 0
        for end in sorted(set(row["actual_seq_len"].tolist())):
            tokens = row["input_ids"][start:end]
            assert row["position_ids"][start:end].tolist() == list(range(end - start))
            learnt = row["loss_mask"][start:end]
            if tokens[0] == PAD:
                assert not tokens.any() and not learnt.any() and end == seq_len
            else:
                document, is_target = wanted.pop(int(tokens[0]))
                assert tokens.tolist() == document.tolist()
                # A token is the label of the place before it.
                assert learnt.tolist() == [*is_target[1:].astype(int), 0]
                labels = row["labels"][start:end]
                assert labels[learnt == 1].tolist() == document[is_target].tolist()
                assert (labels[learnt == 0] == PAD).all()
            start = end
        assert start == seq_len
    assert not wanted


LENGTHS = [3, 32, 5, 17, 31, 8, 9, 12, *[7] * 300]


def test_parquet_rows_hold_the_documents(tmp_path):
    from pyarrow import parquet

    tokenized, packed = packed_documents(LENGTHS)
    write_parquet(tmp_path / "rows.parquet", packed)
    table = parquet.read_table(tmp_path / "rows.parquet")
    assert tuple(table.column_names) == COLUMNS and table.num_rows == packed.num_rows > 64
    check_rows([{column: table[column][row].values.to_numpy() for column in COLUMNS} for row in range(table.num_rows)],
               tokenized)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.parquet"]


def test_mindrecord_rows_hold_the_documents_for_both_of_mindspores_readers(tmp_path, cpu_library):
    from mindspore import dataset
    from mindspore.mindrecord import FileReader

    path = tmp_path / "rows.mindrecord"
    write_mindrecord(path, packed_documents([4])[1])
    tokenized, packed = packed_documents(LENGTHS)
    write_mindrecord(path, packed)  # replaces what was there
    reader = FileReader(str(path))
    rows = list(reader.get_next())
    reader.close()
    assert len(rows) == packed.num_rows
    check_rows(rows, tokenized)
    loaded = dataset.MindDataset(str(path), columns_list=list(COLUMNS), shuffle=False, num_parallel_workers=1)
    check_rows(list(loaded.create_dict_iterator(num_epochs=1, output_numpy=True)), tokenized)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.mindrecord", "rows.mindrecord.db"]


@pytest.mark.parametrize("write", [write_parquet, write_mindrecord])
def test_rows_that_the_files_cannot_hold_are_refused(tmp_path, cpu_library, write):
    extras = {"teacher_ids": np.zeros((1, 4))}
    for packed, reason in ((packed_documents([4], micro_batch_rows=2)[1], "expected rows packed with micro_batch_row"),
                           (packed_documents([4], extras=extras)[1], "the rows have extras")):
        with pytest.raises(ValueError, match=reason):
            write(tmp_path / "rows", packed)
        assert not list(tmp_path.iterdir())


def test_without_pyarrow_the_error_names_the_extra(tmp_path, without_pyarrow):
    with pytest.raises(ImportError, match=r"rows.parquet: .* pip install 'mindpangu\[curate\]'"):
        write_parquet(tmp_path / "rows.parquet", packed_documents([4])[1])


@pytest.mark.parametrize("write", [write_parquet, write_mindrecord])
def test_a_full_disk_names_the_file_and_leaves_no_part_of_it(tmp_path, cpu_library, write):
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("mounting a small tmpfs is not permitted here")
    try:
        # Random tokens, so that compression does not make them fit.
        noise = [(np.random.default_rng(seed).integers(1, 150_000, 2048), np.arange(2048) > 0) for seed in range(80)]
        packed = PackedRows(tokenized_to_samples(noise), seq_len=2048, micro_batch_rows=1, pad_id=PAD)
        (tmp_path / "rows").write_bytes(b"before")
        with pytest.raises(OSError, match="rows"):
            write(tmp_path / "rows", packed)
        assert [path.name for path in tmp_path.iterdir()] == ["rows"] and (tmp_path / "rows").read_bytes() == b"before"
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
