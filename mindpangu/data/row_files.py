"""Packed rows as files that other trainers read: MindRecord (mindformers) and Parquet."""

# T tokens per row, C document ends
import shutil
from pathlib import Path

import numpy as np

from .shards import open_aside

# What mindformers calls the inputs of a step over packed rows.
COLUMNS = ("input_ids", "labels", "loss_mask", "position_ids", "actual_seq_len")
_GROUP_ROWS = 64  # of a Parquet file, in memory at a time


def list_rows(packed):
    """Yields {column: int32 array} for each row of a PackedRows, or ShardBatches, of one row a micro-batch.

    input_ids [T]. labels [T]: the token that follows, where it is learnt, else pad_id. loss_mask [T]: 1 where it is.
    position_ids [T]: from 0 in every document. actual_seq_len [C]: where documents end, padding being the last one,
    then T repeated.
    Raises ValueError for rows with extras, such as a teacher's, which these formats do not hold.
    """
    if packed.micro_batch_rows != 1:
        raise ValueError(f"micro_batch_rows={packed.micro_batch_rows}: expected rows packed with micro_batch_rows=1.")
    for row in range(packed.num_rows):
        batch = packed.assemble(np.array([[row]]))
        if batch.extras:
            raise ValueError("the rows have extras, which MindRecord and Parquet rows do not: export them without.")
        learnt = batch.target_index_AS[0][batch.loss_weights_AS[0] == 1]
        labels_T = np.full(packed.seq_len, packed.pad_id, np.int32)
        labels_T[learnt] = batch.labels_AS[0][batch.loss_weights_AS[0] == 1]
        loss_mask_T = np.zeros(packed.seq_len, np.int32)
        loss_mask_T[learnt] = 1
        values = (batch.tokens_AT[0], labels_T, loss_mask_T, batch.positions_AT[0],
                  batch.cu_seqlens_AC[0, 1:].astype(np.int32))
        yield dict(zip(COLUMNS, values, strict=True))


def write_parquet(path, packed):
    """Writes the columns of `list_rows` as lists of int32, a row a packed row. OSError names the path."""
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError:
        raise ImportError(f"{path}: writing Parquet needs pyarrow: pip install 'mindpangu[curate]'.") from None
    schema = pa.schema([(column, pa.list_(pa.int32())) for column in COLUMNS])
    with open_aside(path) as file, pa.parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        group = []
        for row in list_rows(packed):
            group.append(row)
            if len(group) == _GROUP_ROWS:
                writer.write_table(pa.Table.from_pylist(group, schema))
                group = []
        if group:
            writer.write_table(pa.Table.from_pylist(group, schema))


def write_mindrecord(path, packed):
    """Writes the columns of `list_rows` as a MindRecord: a file and its index, path.db, read by MindDataset.

    Both appear at the end; what stood there is replaced. Raises OSError naming the path if they cannot be written.
    """
    from mindspore.mindrecord import FileWriter

    path = Path(path)
    # MindRecord is written under its final name, which is in the file, to a folder aside.
    aside = path.with_name(path.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        writer = FileWriter(str(aside / path.name), overwrite=True)
        writer.add_schema({column: {"type": "int32", "shape": [-1]} for column in COLUMNS}, "packed rows")
        for row in list_rows(packed):
            writer.write_raw_data([row])
        writer.commit()
        path.unlink(missing_ok=True)  # a file must never stand beside another's index
        for name in (path.name + ".db", path.name):
            (aside / name).replace(path.with_name(name))
    except RuntimeError as error:
        raise OSError(f"{path}: MindRecord could not be written: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
