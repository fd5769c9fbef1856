"""python -m mindpangu.tools.bench [name ...]: our code against named peers, in one run, alternating.

Prints a table (median, min .. max, how many times better than the peer, what is wanted) and writes bench.json to the
working folder. A benchmark is a function without arguments that returns a list of Row; names are those in BENCHMARKS.
"""

import importlib
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from mindpangu.config import RunConfig
from mindpangu.ops.cpu import build
from mindpangu.runtime.device import num_usable_cores, start

from .bench_rows import Row, ratio

# name: file beside this one and its function
BENCHMARKS = {
    "packing": ("bench_data", "bench_packing"),
    "cache": ("bench_data", "bench_cache"),
    "training": ("bench_training", "bench_training"),
    "one_core": ("bench_training", "bench_one_core"),
    "compilation": ("bench_training", "bench_compilation"),
    "head_loss": ("bench_head_loss", "bench_head_loss"),
    "attention": ("bench_attention", "bench_attention"),
    "cached_attention": ("bench_attention", "bench_cached_attention"),
    "adamw": ("bench_training", "bench_adamw"),
    "decoding": ("bench_decoding", "bench_decoding"),
    "openpangu_1b": ("bench_decoding", "bench_openpangu_1b"),
    "linear": ("bench_primitives", "bench_linear"),
    "primitives": ("bench_primitives", "bench_primitives"),
    "embedding": ("bench_primitives", "bench_embedding"),
    "maths": ("bench_rewards", "bench_maths"),
}


def main(names):
    unknown = set(names) - BENCHMARKS.keys()
    if unknown:
        raise SystemExit(f"unknown benchmark {', '.join(sorted(unknown))}: expected some of {', '.join(BENCHMARKS)}")
    print(f"{_processor()}, {num_usable_cores()} cores, CPU library {build.best_level()}")
    print(f"{'name':60} {'ours':>30} {'peer':>30} {'better':>7} {'wanted':>7}  unit (peer)", flush=True)
    records = []
    for name in names or BENCHMARKS:
        # In a process of its own: what another one left in memory would count.
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows.json"
            program = f"from mindpangu.tools.bench import run; run({name!r}, {str(file)!r})"
            subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)
            rows = [Row(**record) for record in json.loads(file.read_text(encoding="utf-8"))]
        for row in rows:
            better = ratio(row)
            met = None if row.wanted is None else better >= row.wanted
            columns = f"{row.name:60} {_spread(row.ours):>30} {_spread(row.peer):>30}"
            wanted = "" if row.wanted is None else f"{row.wanted:.3g}"
            columns += f" {'n/a' if better is None else f'{better:.3g}':>7} {wanted:>7}"
            print(f"{columns}  {row.unit}{f' (peer: {row.peer_name})' if row.peer else ''}"
                  f"{'  MISSED' if met is False else ''}", flush=True)
            records.append({**row._asdict(), "ratio": better, "met": met})
        Path("bench.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


def run(name, file):
    """One benchmark; its rows as JSON into a file."""
    start(RunConfig())
    module, function = BENCHMARKS[name]
    rows = getattr(importlib.import_module(f".{module}", __package__), function)()
    Path(file).write_text(json.dumps([row._asdict() for row in rows]), encoding="utf-8")


def _processor():
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _spread(values):
    if not values:
        return "n/a"
    median, low, high = statistics.median(values), min(values), max(values)
    return f"{median:.4g}" if low == high else f"{median:.4g} ({low:.4g} .. {high:.4g})"


if __name__ == "__main__":
    main(sys.argv[1:])
