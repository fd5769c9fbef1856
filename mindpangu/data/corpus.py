"""A recipe's examples: training and held-out, from whichever source its data section names."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from .arithmetic import make_problems, to_example
from .documents import read_chats, read_documents, read_gsm8k, read_problems


class Corpus(NamedTuple):
    """train and heldout: lists of Example, or of str for plain documents."""

    train: list
    heldout: list
    skipped: list  # errors of malformed lines
    num_unused: int = 0  # training examples beyond data.num_examples


def load_corpus(data):
    """The Corpus of a DataConfig. Raises ValueError for files that are missing, empty or malformed.

    Without data.heldout, the held-out examples are data.num_heldout of data.train, always the same ones.
    """
    if data.source == "arithmetic":
        train = make_problems(data.num_examples, data.seed, "train", data.language)
        heldout = make_problems(data.num_heldout, data.seed, "heldout", data.language)
        return Corpus([to_example(p, _dress(data)) for p in train], [to_example(p, _dress(data)) for p in heldout], [])
    if data.source == "packed":
        heldout = data.heldout or [str(Path(data.train[0], "heldout.jsonl"))]
        found, skipped = read_documents(heldout) if data.dress == "text" else read_chats(heldout, data.on_error)
        return Corpus([], found[:data.num_heldout], skipped)
    for path in [*data.train, *data.heldout]:
        if not Path(path).is_file():
            raise ValueError(f"data.train or data.heldout: no file {path}.")
    train, skipped = _read(data, data.train)
    if data.heldout:
        heldout, more = _read(data, data.heldout)
        skipped += more
    else:
        if len(train) <= data.num_heldout:
            lost = f" ({len(skipped)} malformed lines skipped, the first: {skipped[0]})" if skipped else ""
            raise ValueError(f"data.num_heldout={data.num_heldout}: data.train has only {len(train)} examples{lost}; "
                             "lower data.num_heldout or give data.heldout.")
        order = np.random.Generator(np.random.Philox(len(train))).permutation(len(train))
        heldout = [train[i] for i in sorted(order[:data.num_heldout])]
        train = [train[i] for i in sorted(order[data.num_heldout:])]
    used = train[:data.num_examples or None]
    return Corpus(used, heldout[:data.num_heldout], skipped, len(train) - len(used))


def file_digests(data):
    """{path: digest} of all files of a DataConfig: what a run's key depends on."""
    train = data.train
    if data.source == "packed":  # the manifest has the digests of the shards
        train = [str(Path(folder, name)) for folder in train for name in ("manifest.json", "heldout.jsonl")]
    return digest_files([*train, *data.heldout, *([data.tokenizer] if data.tokenizer else [])])


def digest_files(paths):
    """{path: xxh3_128 of its bytes}."""
    digests = {}
    for path in paths:
        digest = xxhash.xxh3_128()
        try:
            with open(path, "rb") as file:
                while block := file.read(1 << 24):
                    digest.update(block)
        except OSError as error:
            raise ValueError(f"data: cannot read {path}: {error.strerror}.") from error
        digests[str(path)] = digest.hexdigest()
    return digests


def _dress(data):
    """As text, an example is shown with its thoughts."""
    return "reasoning" if data.dress == "text" else data.dress


def _read(data, paths):
    if data.source == "chats":
        return read_chats(paths, data.on_error)
    if data.source == "gsm8k":
        return read_gsm8k(paths, _dress(data), data.on_error)
    if data.source == "problems":
        return read_problems(paths, data.on_error)
    return read_documents(paths, data.on_error)
