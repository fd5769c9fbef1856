"""Where the stages of curation run: processes of this machine. On several machines: ray_engine.py."""

import contextlib
import functools

import numpy as np

from .dedup import band_keys, equal_keys, link_runs, shingle, sign, signed
from .parallel import map_pieces, worker_processes

_PIECE_DOCUMENTS, _PIECE_CHARS = 4096, 1 << 23  # of a piece of work, at most; a longer document is one


def cut(documents, max_documents=_PIECE_DOCUMENTS, max_chars=_PIECE_CHARS):
    """The numbers of documents as pieces of work, arrays in their order."""
    chars = np.cumsum(documents.pool.char_counts_N[documents.numbers], dtype=np.int64)
    begin, pieces = 0, []
    while begin < chars.size:
        before = chars[begin - 1] if begin else 0
        end = min(begin + max_documents, max(begin + 1, int(np.searchsorted(chars, before + max_chars, "right"))))
        pieces.append(documents.numbers[begin:end])
        begin = end
    return pieces


class Local:
    """num_processes processes of this machine, while the context lasts; 1: this process."""

    def __init__(self, num_processes):
        self.num_processes = num_processes

    def __enter__(self):
        self._stack = contextlib.ExitStack()
        self.workers = (self._stack.enter_context(worker_processes(self.num_processes)) if self.num_processes > 1
                         else None)
        return self

    def __exit__(self, *exception):
        return self._stack.__exit__(*exception)

    def ahead(self, function, *arguments):
        """Starts function(*arguments) in one of the processes; returns a function that waits for its result."""
        return self.workers.submit(function, *arguments).result if self.workers else functools.partial(
            function, *arguments)

    def map_batches(self, function, batches):
        """Yields function(batch) for each batch, in their order."""
        yield from map_pieces(self.workers, function, batches, self.num_processes)

    def map(self, function, pool, pieces):
        """Yields function(pool, piece) for each piece, in their order."""
        yield from map_pieces(self.workers, functools.partial(_apply, function, pool), pieces, self.num_processes)

    def link(self, documents, settings, scratch, on_done):
        """int64 for each document: the place of the first of those that are linked to it by bands that two share.

        settings: a NearDuplicatesConfig. scratch: a folder for the bands' keys, 8 bytes each; one band at a time is in
        memory. on_done(count) of documents that are signed.
        """
        scratch.mkdir(parents=True, exist_ok=True)
        num_bands = settings.num_permutations // settings.band_size
        files = [open(scratch / f"band-{band:03d}", "wb") for band in range(num_bands)]  # noqa: SIM115
        try:
            places, count = [], 0
            pieces = cut(documents)
            signing = self.map(functools.partial(sign_piece, settings), documents.pool, pieces)
            for piece, (signed_D, keys_BD) in zip(pieces, signing, strict=True):
                places.append(signed_D + count)
                for file, keys_D in zip(files, keys_BD, strict=True):
                    file.write(keys_D.tobytes())
                count += piece.size
                on_done(count)
        finally:
            for file in files:
                file.close()
        places = np.concatenate(places)
        components = np.arange(len(documents.numbers))
        for file in files:
            members, starts = equal_keys(np.fromfile(file.name, np.uint64))
            components = link_runs(components, places[members], starts)
        return components


def sign_piece(settings, pool, numbers):
    """(places in the piece of the documents that have shingles, keys uint64 [B, those])."""
    signatures = sign(shingle(pool.texts(numbers), settings.num_words),
                      settings.num_permutations)
    signed_D = signed(signatures)
    return signed_D, np.stack([keys_D[signed_D] for keys_D in band_keys(signatures, settings.band_size)])


def _apply(function, pool, piece):
    return function(pool, piece)
