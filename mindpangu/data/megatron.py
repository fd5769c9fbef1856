"""Megatron's indexed data sets: token ids of documents in PREFIX.bin, where they start in PREFIX.idx.

PREFIX.idx, little-endian: magic "MMIDIDX" with two zero bytes; uint64 version 1; uint8 code of the token's type;
uint64 number of sequences S; uint64 number of document boundaries D + 1; int32 [S] tokens of each sequence; int64 [S]
bytes before each sequence in PREFIX.bin; int64 [D + 1] sequences before each document. Source: Megatron-LM,
megatron/core/datasets/indexed_dataset.py, which mindformers 1.9.0 has too.
"""

# S sequences, D documents
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .shards import open_aside

_MAGIC = b"MMIDIDX\x00\x00"
_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}  # 6 and 7 are floating-point
_HEADER_BYTES = len(_MAGIC) + 8 + 1 + 8 + 8
_AGAIN = "copy or write both files again"


class IndexedTokens(NamedTuple):
    """Documents of sequences of token ids; document d has the sequences documents_D1[d] to documents_D1[d + 1]."""

    tokens: np.ndarray  # of PREFIX.bin, mapped from disk
    starts_S: np.ndarray  # int64, tokens before a sequence
    lengths_S: np.ndarray  # int32
    documents_D1: np.ndarray  # int64

    @property
    def num_documents(self):
        return self.documents_D1.size - 1

    def document(self, d):
        """The token ids of document d, its sequences one after the other."""
        spans = [slice(self.starts_S[s], self.starts_S[s] + self.lengths_S[s])
                 for s in range(self.documents_D1[d], self.documents_D1[d + 1])]
        return np.concatenate([self.tokens[span] for span in spans] or [self.tokens[:0]])


def write_megatron(prefix, documents, dtype="int32"):
    """Writes an iterable of one-dimensional arrays of token ids, each a document of one sequence, one at a time.

    dtype: of the file; "uint16" halves it for vocabularies up to 65,536. Both files appear at the end.
    Raises ValueError for documents without tokens, of another shape or type, or with ids beyond dtype, and if there are
    none; OSError names the file.
    """
    codes = {name: code for code, name in _DTYPES.items()}
    if dtype not in codes:
        raise ValueError(f"dtype={dtype!r}: expected one of {', '.join(codes)}.")
    bounds, stored, lengths = np.iinfo(dtype), np.dtype(dtype).newbyteorder("<"), []
    data_path, index_path = _paths(prefix)
    with open_aside(index_path) as index, open_aside(data_path) as data:
        for number, document in enumerate(documents):
            tokens = np.asarray(document)
            if tokens.ndim != 1 or not 0 < tokens.size < 1 << 31 or tokens.dtype.kind not in "iu":
                raise ValueError(f"document {number} has shape {tokens.shape} and type {tokens.dtype}: expected one "
                                 "row of 1 to 2,147,483,647 token ids.")
            if tokens.min() < bounds.min or tokens.max() > bounds.max:
                raise ValueError(f"document {number} has token ids from {tokens.min()} to {tokens.max()}: {dtype} "
                                 f"holds {bounds.min} to {bounds.max}; choose a larger dtype.")
            data.write(tokens.astype(stored).tobytes())
            lengths.append(tokens.size)
        if not lengths:
            raise ValueError(f"{prefix}: no documents to write: expected at least one.")
        lengths_S = np.array(lengths, np.int64)
        header = [_MAGIC, (1).to_bytes(8, "little"), bytes([codes[dtype]])]
        header += [count.to_bytes(8, "little") for count in (len(lengths), len(lengths) + 1)]
        starts_S = (np.cumsum(lengths_S) - lengths_S) * stored.itemsize
        index.write(b"".join([*header, lengths_S.astype("<i4").tobytes(), starts_S.astype("<i8").tobytes(),
                              np.arange(len(lengths) + 1, dtype="<i8").tobytes()]))
        data.flush()
        index.flush()
        # An index must never stand beside the tokens of another.
        index_path.unlink(missing_ok=True)


def read_megatron(prefix):
    """The IndexedTokens of a prefix. Raises ValueError naming the file for anything but a whole, matching pair."""
    data_path, index_path = _paths(prefix)
    index = index_path.read_bytes()
    if len(index) < _HEADER_BYTES or not index.startswith(_MAGIC):
        raise ValueError(f"{index_path}: {len(index)} bytes that start with {index[:9]!r}: expected an index that "
                         f"starts with {_MAGIC!r}.")
    version, code = int.from_bytes(index[9:17], "little"), index[17]
    num_sequences, num_bounds = (int.from_bytes(index[i : i + 8], "little") for i in (18, 26))
    if version != 1 or code not in _DTYPES:
        raise ValueError(f"{index_path}: version {version}, type {code}: expected version 1 and a type of whole "
                         f"numbers, {', '.join(f'{known} ({name})' for known, name in _DTYPES.items())}.")
    num_bytes = _HEADER_BYTES + 12 * num_sequences + 8 * num_bounds
    if len(index) != num_bytes:
        raise ValueError(f"{index_path}: {len(index)} bytes, expected {num_bytes} for {num_sequences} sequences in "
                         f"{num_bounds - 1} documents: cut off, or an index of several modalities.")
    lengths_S = np.frombuffer(index, "<i4", num_sequences, _HEADER_BYTES)
    pointers_S = np.frombuffer(index, "<i8", num_sequences, _HEADER_BYTES + 4 * num_sequences)
    documents_D1 = np.frombuffer(index, "<i8", num_bounds, _HEADER_BYTES + 12 * num_sequences)
    if not num_bounds or documents_D1[0] != 0 or documents_D1[-1] != num_sequences or (np.diff(documents_D1) < 0).any():
        raise ValueError(f"{index_path}: the documents' boundaries do not go from 0 to {num_sequences}: {_AGAIN}.")
    dtype = np.dtype(_DTYPES[code]).newbyteorder("<")
    starts_S, rests_S = np.divmod(pointers_S, dtype.itemsize)
    num_tokens = int((starts_S + lengths_S).max(initial=0))
    if rests_S.any() or min(lengths_S.min(initial=0), starts_S.min(initial=0)) < 0:
        raise ValueError(f"{index_path}: sequences of negative length or place: {_AGAIN}.")
    if data_path.stat().st_size != num_tokens * dtype.itemsize:
        raise ValueError(f"{data_path}: {data_path.stat().st_size} bytes, expected the {num_tokens} tokens of "
                         f"{dtype.itemsize} bytes that {index_path.name} has: {_AGAIN}.")
    tokens = np.memmap(data_path, dtype, "r") if num_tokens else np.zeros(0, dtype)
    return IndexedTokens(tokens, starts_S, lengths_S, documents_D1)


def _paths(prefix):
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
