"""What a benchmark returns, and how two programs are timed against each other."""

import statistics
import time
from typing import NamedTuple


class Row(NamedTuple):
    """One comparison, one value per run: rates (".../s") are better when larger, times and sizes when smaller."""

    name: str
    unit: str
    ours: list
    peer_name: str = ""
    peer: list = ()
    wanted: float | None = None  # how many times better than the peer this is meant to be


def ratio(row):
    """How many times better ours is than the peer, by medians; None without a peer."""
    if not row.peer:
        return None
    ours, peer = statistics.median(row.ours), statistics.median(row.peer)
    return ours / peer if row.unit.endswith("/s") else peer / ours


def alternate(ours, peer, num_runs, clock=time.perf_counter):
    """Seconds per run of two functions, [num_runs] each; alternating, so that a busy machine slows both."""
    seconds = [], []
    for _ in range(num_runs):
        for function, durations in zip((ours, peer), seconds, strict=True):
            began = clock()
            function()
            durations.append(clock() - began)
    return seconds


def rates(count, seconds):
    return [count / duration for duration in seconds]
