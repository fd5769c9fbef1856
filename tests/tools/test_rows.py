"""Packed rows out to other trainers' files and back; oracles: pyarrow, MindSpore's reader, the documents themselves."""

import json

import numpy as np
import pytest
from mindpangu.tools.rows import main

from mindpangu.data.chat import template_digest
from mindpangu.data.megatron import read_megatron, write_megatron
from mindpangu.data.packed_shards import PackedShards, write_packed
from mindpangu.data.row_files import COLUMNS
from mindpangu.data.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    tokenizer = train_tokenizer([" ".join(f"w{n}" for n in range(99))] * 3, 276, folder / "tokenizer.model")
    rng = np.random.default_rng(0)
    documents = [rng.integers(9, 276, rng.integers(2, 40)).astype(np.int32) for _ in range(60)]
    write_packed(folder / "rows", 60, lambda first, end: [(tokens, np.arange(tokens.size) > 0)
                                                         for tokens in documents[first:end]],
                 seq_len=64, pad_id=tokenizer.pad_id, samples_per_shard=25,
                 binding={"tokenizer": tokenizer.digest, "template": template_digest()})
    return folder, documents, tokenizer


def found_in(rows):
    """The documents in rows of the columns, as sorted lists."""
    documents = []
    for row in rows:
        start = 0
        for end in sorted(set(np.asarray(row["actual_seq_len"]).tolist())):
            if np.asarray(row["loss_mask"])[start:end].any():
                documents.append(np.asarray(row["input_ids"])[start:end].tolist())
            start = end
    return sorted(documents)


def test_parquet_and_mindrecord_hold_every_document(made, tmp_path):
    from mindspore.mindrecord import FileReader
    from pyarrow import parquet

    folder, documents, _ = made
    expected = sorted(tokens.tolist() for tokens in documents)
    main(["parquet", str(folder / "rows"), str(tmp_path / "rows.parquet")])
    assert found_in(parquet.read_table(tmp_path / "rows.parquet").to_pylist()) == expected
    main(["mindrecord", str(folder / "rows"), str(tmp_path / "rows.mindrecord")])
    reader = FileReader(str(tmp_path / "rows.mindrecord"), columns=list(COLUMNS))
    assert found_in(reader.get_next()) == expected
    reader.close()


def test_megatron_and_back(made, tmp_path, capsys):
    folder, documents, tokenizer = made
    main(["megatron", str(folder / "rows"), str(tmp_path / "corpus")])
    indexed = read_megatron(tmp_path / "corpus")
    assert sorted(indexed.document(d).tolist() for d in range(60)) == sorted(tokens.tolist() for tokens in documents)
    main(["packed", str(tmp_path / "corpus"), str(tmp_path / "again"), "--tokenizer", tokenizer.model_file, "--seq-len",
          "16", "--num-heldout", "5"])
    shards = PackedShards(tmp_path / "again")
    shards.check(tokenizer=tokenizer.digest, template=template_digest(), seq_len=16, pad_id=tokenizer.pad_id)
    tokens = np.concatenate([shards.read(i)["tokens"] for i in range(len(shards.counts))])
    cut = [piece for d in range(55) for piece in np.split(indexed.document(d), range(16, 99, 16)) if piece.size > 1]
    assert sorted(tokens.tolist()) == sorted(np.concatenate(cut).tolist())
    heldout = [json.loads(line)["text"] for line in (tmp_path / "again/heldout.jsonl").read_text("utf-8").splitlines()]
    assert heldout == [tokenizer.decode(indexed.document(d).tolist()) for d in range(55, 60)]
    assert capsys.readouterr().out.split() == [str(tmp_path / "corpus"), str(tmp_path / "again")]


@pytest.mark.parametrize("words, said", [
    (["parquet", "nowhere", "x"], "nowhere"),
    (["packed", "{corpus}", "{out}"], "needs --tokenizer and --seq-len"),
    (["packed", "{corpus}", "{out}", "--tokenizer", "{tokenizer}", "--seq-len", "16", "--num-heldout", "9"],
     "--num-heldout is 9"),
    (["packed", "{corpus}", "{out}", "--tokenizer", "{tokenizer}", "--seq-len", "16", "--num-heldout", "1"],
     "document 0 has token ids from 1 to 5000"),
])
def test_bad_input_is_an_error_of_one_line(made, tmp_path, words, said):
    write_megatron(tmp_path / "corpus", [np.array([1, 5000]), np.array([1, 2])])
    places = {"corpus": tmp_path / "corpus", "out": tmp_path / "out", "tokenizer": made[2].model_file}
    with pytest.raises(SystemExit, match="^error: .*" + said):
        main([word.format(**places) for word in words])
