"""Work on pieces of data over processes, the results in order."""

import contextlib
import gc
import itertools
import multiprocessing
import os
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

_PIECES_AHEAD = 2  # waiting results for each process


@contextlib.contextmanager
def worker_processes(num_processes, start=None, arguments=()):
    """An executor of so many processes, in each of which start(*arguments) is called first.

    Each starts anew, for the parent may have threads: the caller's main module has to be importable. They end with the
    parent, however it ends. Raises RuntimeError, in the block, for a process that was killed.
    """
    pool = ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn"), _begin, (start, arguments))
    for _ in range(num_processes):
        pool.submit(_nothing)  # for them to import what they need while others work
    try:
        yield pool
    except BrokenProcessPool as error:
        raise RuntimeError("a worker process ended in the middle of its work: killed, by hand or for want of memory; "
                           "run the command again, with fewer processes where memory is short.") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(start, arguments):
    threading.Thread(target=_end_with_parent, daemon=True).start()
    collect_rarely()
    if start:
        start(*arguments)


def collect_rarely():
    """Lets Python's collector look for cycles less often: pieces of work make many objects and no cycles."""
    gc.set_threshold(100_000, 50, 50)


def _nothing():
    pass


def _end_with_parent():
    # The executor's own processes wait for ever: each holds both ends of the queue that their work comes from.
    multiprocessing.parent_process().join()
    os._exit(1)


def map_pieces(pool, function, pieces, num_processes):
    """Yields function(piece) for each of pieces, in their order; at most a few results wait in memory.

    pool: of `worker_processes`, with num_processes; None: this process. What a pool gets is pickled.
    """
    if pool is None:
        yield from map(function, pieces)
        return
    pieces = iter(pieces)
    waiting = deque(pool.submit(function, piece) for piece in itertools.islice(pieces, _PIECES_AHEAD * num_processes))
    while waiting:
        yield waiting.popleft().result()
        waiting.extend(pool.submit(function, piece) for piece in itertools.islice(pieces, 1))
