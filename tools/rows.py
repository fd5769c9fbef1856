"""Packed rows for other trainers, and Megatron's tokens as packed rows.

    python -m mindpangu.tools.rows parquet runs/<curation>/rows rows.parquet
    python -m mindpangu.tools.rows mindrecord runs/<curation>/rows rows.mindrecord
    python -m mindpangu.tools.rows megatron runs/<curation>/rows corpus        writes corpus.bin and corpus.idx
    python -m mindpangu.tools.rows packed corpus rows --tokenizer tokenizer.model --seq-len 4096 --num-heldout 500

Parquet and MindRecord get the columns that mindformers names (data/row_files.py), Megatron every document as it is. The
last one reads corpus.bin and corpus.idx and writes a folder for data.source=packed data.train=[rows] data.dress=text.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import xxhash

from mindpangu.data.chat import template_digest
from mindpangu.data.megatron import read_megatron, write_megatron
from mindpangu.data.packed_shards import PackedShards, ShardBatches, bound_samples, write_packed
from mindpangu.data.pool import json_line
from mindpangu.data.row_files import write_mindrecord, write_parquet
from mindpangu.data.shards import open_aside
from mindpangu.data.tokenizer import Tokenizer

_SAMPLES_PER_SHARD = 65536


def export_rows(form, folder, path):
    """Writes the packed rows of a folder as a file of a form, one shard in memory at a time."""
    shards = PackedShards(folder)
    if form == "megatron":
        write_megatron(path, (arrays["tokens"][begin:end] for arrays in map(shards.read, range(len(shards.counts)))
                              for begin, end in _spans(arrays["lengths"])))
        return
    rows = ShardBatches(shards, seq_len=int(shards.binding["seq_len"]), rows_per_step=1, micro_batch_rows=1,
                        pad_id=int(shards.binding["pad_id"]), seed=0)
    {"parquet": write_parquet, "mindrecord": write_mindrecord}[form](path, rows)


def import_megatron(prefix, folder, tokenizer_file, seq_len, num_heldout, samples_per_shard=_SAMPLES_PER_SHARD):
    """Writes the documents of Megatron's files as packed rows, the last num_heldout, as text, to heldout.jsonl.

    Raises ValueError for ids that the tokenizer does not have, and if nothing is left to train on.
    """
    indexed, tokenizer = read_megatron(prefix), Tokenizer(tokenizer_file)
    num_train = indexed.num_documents - num_heldout
    if num_heldout < 1 or num_train < 1:
        raise ValueError(f"{prefix} has {indexed.num_documents} documents, --num-heldout is {num_heldout}: expected at "
                         "least one of each kind.")

    def tokenize(first, end):
        samples = []
        for d in range(first, end):
            tokens = np.array(indexed.document(d), np.int32)
            if tokens.min() < 0 or tokens.max() >= tokenizer.vocab_size:
                raise ValueError(f"{prefix}: document {d} has token ids from {tokens.min()} to {tokens.max()}, the "
                                 f"tokenizer {tokenizer.vocab_size} pieces: give the one it was made with.")
            samples.append((tokens, np.arange(tokens.size) > 0))
        return samples

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(tokenizer_file, folder / "tokenizer.model")
    hidden = {tokenizer.bos_id, tokenizer.eos_id}
    with open_aside(folder / "heldout.jsonl") as file:
        for d in range(num_train, indexed.num_documents):
            tokens = [token for token in indexed.document(d).tolist() if token not in hidden]
            file.write(json_line({"text": tokenizer.decode(tokens)}))
    index = xxhash.xxh3_128_hexdigest(Path(f"{prefix}.idx").read_bytes())
    write_packed(folder, num_train, tokenize, seq_len=seq_len, pad_id=tokenizer.pad_id, on_long="split",
                 samples_per_shard=bound_samples(samples_per_shard, indexed.tokens.size / indexed.num_documents),
                 binding={
                     "tokenizer": tokenizer.digest, "template": template_digest(), "made_from": f"megatron {index}"})


def _spans(lengths):
    ends = np.cumsum(lengths, dtype=np.int64)
    return zip((ends - lengths).tolist(), ends.tolist(), strict=True)


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m mindpangu.tools.rows", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("form", choices=("parquet", "mindrecord", "megatron", "packed"), help="what to write")
    parser.add_argument("source", help="a folder of packed rows; for packed the prefix of Megatron's two files")
    parser.add_argument("path", help="the file, prefix or folder to write")
    parser.add_argument("--tokenizer", metavar="FILE", help="for packed: the SentencePiece model of the token ids")
    parser.add_argument("--seq-len", type=int, metavar="N", help="for packed: tokens of a row")
    parser.add_argument("--num-heldout", type=int, default=500, metavar="N", help="for packed: documents to validate "
                        "on, the last ones (%(default)s)")
    parsed = parser.parse_args(arguments)
    try:
        if parsed.form != "packed":
            export_rows(parsed.form, parsed.source, parsed.path)
        elif not (parsed.tokenizer and parsed.seq_len):
            raise ValueError("packed needs --tokenizer and --seq-len.")
        else:
            import_megatron(parsed.source, parsed.path, parsed.tokenizer, parsed.seq_len, parsed.num_heldout)
    except (ValueError, OSError, ImportError, json.JSONDecodeError) as error:
        raise SystemExit(f"error: {error}") from None
    print(parsed.path)


if __name__ == "__main__":
    main()
