"""Grading of mathematical answers through the pool of killable workers, in checks per second."""

import functools
import itertools
import logging
import random
from concurrent.futures import ThreadPoolExecutor

from mindpangu.rewards.workers import WorkerPool

from .bench_rows import Row, alternate, rates

_NUM_WORKERS, _NUM_RUNS = 2, 5
_NUM_CHECKS, _NUM_PEER_CHECKS = 2400, 240
_WANTED = 500.0  # checks per second on 2 cores
# (gold, answer) of random numbers; off is 0 for a right answer and 1 for a wrong one.
_NUMBERS = (
    lambda a, b, c, off: (f"{a}", rf"{a + off}.0 \text{{ apples}}"),
    lambda a, b, c, off: (rf"\frac{{{a}}}{{{b}}}", rf"\dfrac{{{a * c + off}}}{{{b * c}}}"),
    lambda a, b, c, off: (f"{a}.{b}", f"{100 * a + b + off}/100"),
    lambda a, b, c, off: (rf"{b}\%", f"0.{b + off}"),
)
_FORMS = (
    *_NUMBERS,
    lambda a, b, c, off: (f"({a}, {-b}, {c})", rf"\left({a},{-b - off},\frac{{{2 * c}}}{{2}}\right)"),
    lambda a, b, c, off: (f"[{b}, {a + 99})", rf"{b} \le x {'<>'[off]} {a + 99}"),
    lambda a, b, c, off: (f"{a}, {-b}", f"x = {-b} 或 x = {a + off}"),
    lambda a, b, c, off: (f"x = {a}", f"{a + off}"),
    lambda a, b, c, off: (rf"{b}\sqrt{{{a}}}", rf"\sqrt{{{a * b * b + off}}}"),
    lambda a, b, c, off: (f"{b}x + {a}", f"{a} + {b + off}x"),
    lambda a, b, c, off: (rf"\frac{{{b}\pi}}{{{c}}}", rf"{b + off}\pi/{c}"),
    lambda a, b, c, off: (rf"{a} \text{{ cm}}", f"{a + off}厘米"),
)


def random_pairs(forms, count, seed):
    """[(gold, answer)], every second one wrong; hardly two alike, so that no cache helps."""
    rng = random.Random(seed)
    return [forms[place // 2 % len(forms)](rng.randint(2, 999), rng.randint(10, 98), rng.randint(10, 98), place % 2)
            for place in range(count)]


def bench_maths():
    """Twelve simple forms, and numbers alone; peer: math-verify's parse and verify in one process, without limits."""
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own limits are off
    seeds = itertools.count()
    rows = []
    with WorkerPool("mindpangu.rewards.math:check_pair", _NUM_WORKERS, 60) as pool, \
            ThreadPoolExecutor(_NUM_WORKERS) as threads:

        def ours(forms):
            list(threads.map(lambda pair: pool.call(*pair), random_pairs(forms, _NUM_CHECKS, next(seeds))))

        def theirs(forms):
            for texts in random_pairs(forms, _NUM_PEER_CHECKS, next(seeds)):
                verify(*(parse(rf"\boxed{{{text}}}", parsing_timeout=None) for text in texts), timeout_seconds=None)

        for name, forms in (("simple answers of 12 forms", _FORMS), ("numbers", _NUMBERS)):
            ours(forms)  # the workers start
            seconds = alternate(functools.partial(ours, forms), functools.partial(theirs, forms), _NUM_RUNS)
            speed, peer = rates(_NUM_CHECKS, seconds[0]), rates(_NUM_PEER_CHECKS, seconds[1])
            rows += [Row(f"maths verifier, {name}", "checks/s", speed, "math-verify, one process", peer),
                     Row(f"maths verifier, {name}", "checks/s", speed, "the rate wanted", [_WANTED], 1.0)]
    return rows
