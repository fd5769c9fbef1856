"""Numbers of a run: metrics.jsonl, the step line, and progress with the time left."""

import json
import os
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .cluster import world

_PLAIN_SECONDS = 30  # between progress lines where the output is not a terminal


def say(text):
    """One line to the user, at once, without rich's markup; of several ranks only the first speaks."""
    if world().is_main:
        _console().print(text, markup=False, highlight=False, soft_wrap=True)


def _console():
    return Console(file=sys.stdout)


def peak_memory_gib(device="CPU"):
    """This process's peak so far, GiB: of resident memory, or on "Ascend" of what its tensors took of the NPU's (not
    run by the authors).

    Not getrusage's resident memory: that is at least what the process had that started this one.
    """
    if device == "Ascend":
        import mindspore as ms

        return ms.runtime.max_memory_allocated() / 2**30
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) / 2**20


def format_seconds(seconds):
    """90 -> "1m30s"."""
    seconds = int(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


class Reporter:
    """Progress of long work: a live bar on a terminal, elsewhere a plain line every 30 s; both with the time left.

    within: the work is part of other work that has a bar already: plain lines only.
    """

    def __init__(self, title, total, done=0, within=False):
        self.title, self.total, self.done, self.start_done = title, total, done, done
        self.started = self.last_line = time.monotonic()
        self.bar = None
        if sys.stdout.isatty() and not within and world().is_main:
            self.bar = Progress(TextColumn("{task.description}"), BarColumn(),
                                TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn(), TextColumn("left"),
                                TimeRemainingColumn(), console=_console(), transient=True)
            self.task = self.bar.add_task(title, total=total, completed=done)

    def __enter__(self):
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_):
        if self.bar:
            self.bar.stop()

    def eta_s(self):
        """Seconds left at the pace so far, or None before the first piece is done."""
        pieces = self.done - self.start_done
        return None if not pieces else (self.total - self.done) * (time.monotonic() - self.started) / pieces

    def advance(self, done, line=None):
        """`done` of the total are done. line: what to print on a terminal above the bar, or in the plain line."""
        self.done = done
        if self.bar:
            self.bar.update(self.task, completed=done)
            if line:
                self.bar.console.print(line, markup=False, highlight=False)
            return
        now = time.monotonic()
        if now - self.last_line >= _PLAIN_SECONDS:
            self.last_line = now
            eta = self.eta_s()
            left = f", {format_seconds(eta)} left" if eta is not None else ""
            say(line or f"{self.title}: {done}/{self.total}{left}")


class MetricsFile:
    """metrics.jsonl of a run folder: one JSON object a line, {"step": ..., name: number, ...}; of several ranks only
    the first writes it."""

    def __init__(self, folder, writes=True):
        self.writes = writes
        self.path = Path(folder, "metrics.jsonl")
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def keep_until(self, step):
        """Drop what a killed run wrote after its last checkpoint, so that no step stands twice."""
        if not self.writes or not self.path.exists():
            return
        lines = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # the line that the kill cut
                continue
            if row["step"] <= step:
                lines.append(line)
        aside = self.path.with_suffix(".writing")
        aside.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        os.replace(aside, self.path)

    def write(self, step, values):
        if not self.writes:
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")


def step_line(step, num_steps, values, eta_s):
    """The line a user reads: step, loss and what belongs to it, grad norm, lr, tokens/s, MFU, data wait, memory, time
    left."""
    mfu = f"{values['mfu']:.1%}" if values.get("mfu") is not None else "n/a"
    extra = "".join(f"  {name} {values[name]:.4f}" for name in ("reward", "ce", "kl", "agreement", "entropy")
                    if name in values)
    extra += "".join(f"  {name} {values[name]:.1%}" for name in ("correct", "dead_groups", "truncated", "rollout_time")
                     if name in values)
    if "answer_len" in values:
        extra += f"  answer_len {values['answer_len']:.1f}"
    left = format_seconds(eta_s) if eta_s is not None else "?"
    return (f"step {step}/{num_steps}  loss {values['loss']:.4f}{extra}  grad_norm {values['grad_norm']:.3f}  "
            f"lr {values['lr']:.2e}  tok/s {values['tokens_per_s']:,.0f}  mfu {mfu}  "
            f"data {values['data_wait']:.1%}  mem {values['memory_gib']:.2f} GiB  eta {left}")
