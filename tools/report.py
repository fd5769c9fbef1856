"""python -m mindpangu.tools.report RUN... [-o report.html]: run folders as one self-contained HTML file.

Curves, a table, the fields in which the recipes differ, and sample answers, several runs side by side. Reads finished
and unfinished runs. Imports no MindSpore.
"""

import argparse
import base64
import hashlib
import json
import math
import os
import re
import sys
from html import escape
from pathlib import Path
from typing import NamedTuple

if __package__:
    from . import report_grpo
else:  # python tools/report.py in a checkout: the package is one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import report_grpo

from mindpangu.benchmarks.results import as_html
from mindpangu.runtime.metrics import format_seconds

_PLOT_WIDTH, _PLOT_HEIGHT = 340, 212  # SVG units
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 16, 8, 34  # margins around the axes
_MAX_POINTS = 600  # per line; more than a plot has pixels
_SMOOTH_FROM = 120  # points from which on a training curve gets a running mean
_LOG_FROM = 30  # ratio of largest to smallest from which on an axis is logarithmic
_LEAST_SHARE = 0.005  # span of an axis of shares: below it the labels would need more digits than there is room for
_NUM_COLOURS = 7
_NUM_OPEN_SAMPLES = 4
_NO_VALUE = "–"


class Metric(NamedTuple):
    title: str
    unit: str
    kind: str = "number"  # number | logarithmic (where the values call for it) | share | rate (axis starts at 0)


# In the order of the plots. Those not listed follow under their own name.
METRICS = {
    "loss": Metric("Loss", "nats per token", "logarithmic"),
    "ce": Metric("Cross-entropy to the labels", "nats per token", "logarithmic"),
    "reward": Metric("Reward", "mean over the answers of a rollout"),
    "correct": Metric("Right answers in rollouts", "% of sampled answers", "share"),
    "kl": Metric("KL to the teacher", "nats per token; of GRPO: to the starting policy, k3", "logarithmic"),
    "agreement": Metric("Top-1 agreement with the teacher", "% of tokens", "share"),
    "teacher_mass": Metric("Teacher mass within its top k", "% probability, mean over tokens", "share"),
    "accuracy": Metric("Held-out accuracy", "% of held-out problems", "share"),
    "truncated": Metric("Truncated answers", "% of held-out problems, or of sampled answers", "share"),
    "answer_len": Metric("Answer length", "tokens, mean over sampled answers", "rate"),
    "entropy": Metric("Entropy of the policy", "nats per token", "rate"),
    "dead_groups": Metric("Groups that teach nothing", "% of prompts whose answers all got the same reward", "share"),
    "masked": Metric("Masked answers", "% of sampled answers, outside the loss", "share"),
    "clipped": Metric("Clipped tokens", "% of tokens", "share"),
    "policy": Metric("Policy loss", "clipped surrogate"),
    "rollout_time": Metric("Time in rollouts", "% of the time", "share"),
    "sampler_diff": Metric("Sampler against trainer", "nats, mean difference of log-probabilities", "logarithmic"),
    "sampler_diff_max": Metric("Sampler against trainer, worst token", "nats", "logarithmic"),
    "own_kl": Metric("KL to the teacher on own answers", "nats per token", "logarithmic"),
    "lr": Metric("Learning rate", "of AdamW, at the step", "rate"),
    "grad_norm": Metric("Gradient norm", "global L2 norm before clipping", "logarithmic"),
    "tokens_per_s": Metric("Throughput", "tokens/s, padding included", "rate"),
    "mfu": Metric("Model FLOPs utilisation", "% of the device's peak", "share"),
    "data_wait": Metric("Waiting for data", "% of the step's time", "share"),
    "memory_gib": Metric("Peak memory so far", "GiB", "rate"),
}
_NOT_PLOTTED = ("step", "time", "num_tokens", "rounds")
_NEVER_SMOOTHED = ("lr", "memory_gib")


class Run(NamedTuple):
    """A run folder as read. rows: metrics.jsonl; samples: {step: sample answers}, first and last validation only."""

    name: str
    recipe: dict  # {"section.field": value}
    environment: dict
    rows: list
    num_unreadable: int  # lines of metrics.jsonl left out
    samples: dict
    done: dict | None  # done.json, of a finished run
    best_step: int | None
    refreshes: list  # summaries of the refreshes: ({} or answers/summary.json, {} or annotations/summary.json)
    evaluation: dict | None  # results.json of an evaluation, see benchmarks.results
    pass_rates: dict | None  # of GRPO, see report_grpo
    transcripts: dict


class Line(NamedTuple):
    """One curve: a metric of a run, in training or on held-out data. points: [(step, value)], finite values only."""

    run: int
    split: str  # train | heldout
    points: list
    num_not_finite: int


# ---- Reading ---------------------------------------------------------------------------------------------------------

def read_run(folder):
    """The Run in a folder. Raises ValueError naming the folder and what was expected in it."""
    folder = Path(folder)
    expected = "expected a run folder as python -m mindpangu.train writes it, with run.json and metrics.jsonl in it"
    if not folder.is_dir():
        raise ValueError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}; {expected}.")
    if not (folder / "run.json").is_file():
        inside = sorted(str(path.parent) for path in folder.glob("*/run.json"))
        hint = f" It holds the run folders {', '.join(inside)}: give those." if inside else ""
        raise ValueError(f"{folder}: has no run.json; {expected}.{hint}")
    started = _read_json(folder / "run.json")
    if not isinstance(started.get("recipe"), dict):
        raise ValueError(f"{folder / 'run.json'}: has no recipe; {expected}.")
    done = _read_json(folder / "done.json", missing=None)
    if done is not None and type(done.get("step")) is not int:
        raise ValueError(f"{folder / 'done.json'}: step is {done.get('step')!r}, expected the number of steps.")
    rows, num_unreadable = read_metrics(folder / "metrics.jsonl")
    steps = {int(match.group(1)): path for path in folder.glob("samples/step-*.jsonl")
             if (match := re.fullmatch(r"step-(\d+)", path.stem))}
    best = folder / "checkpoints" / "best"
    best_step = re.search(r"step-(\d+)$", os.readlink(best)) if best.is_symlink() else None
    refreshes = sorted(folder.glob("refresh-*"), key=lambda path: (len(path.name), path.name))
    return Run(
        name=folder.resolve().name,
        recipe=flatten(started["recipe"]),
        environment=_read_json(folder / "env.json", missing={}),
        rows=rows, num_unreadable=num_unreadable,
        samples={step: _read_samples(steps[step]) for step in sorted({min(steps), max(steps)} if steps else ())},
        done=done,
        best_step=int(best_step.group(1)) if best_step else None,
        refreshes=[tuple(_read_json(refresh / part / "summary.json", missing={}) for part in ("answers", "annotations"))
                   for refresh in refreshes],
        evaluation=_read_json(folder / "results.json", missing=None),
        pass_rates=report_grpo.read_pass_rates(folder), transcripts=report_grpo.read_transcripts(folder))


def read_metrics(path):
    """(rows, number of lines left out). A line that a kill cut, or that has no step, is left out; no file, no rows."""
    if not path.exists():
        return [], 0
    rows, num_unreadable = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if isinstance(row, dict) and type(row.get("step")) is int:
            rows.append(row)
        elif line.strip():
            num_unreadable += 1
    return rows, num_unreadable


def _read_json(path, **default):
    """The object in a JSON file, or `missing` where there is no file. Raises ValueError if it is not an object."""
    if "missing" in default and not path.exists():
        return default["missing"]
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error}); expected what python -m mindpangu.train "
                         "wrote.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}, expected a JSON object.")
    return value


def _read_samples(path):
    samples = []
    for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            sample = json.loads(line)
            samples.append({"prompt": str(sample["prompt"]), "answer": str(sample["answer"]),
                            "value": str(sample["value"]), "correct": bool(sample["correct"]),
                            "truncated": bool(sample["truncated"])})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{i}: {error!r}; expected an object with prompt, answer, value, correct and "
                             "truncated.") from error
    return samples


def flatten(recipe, prefix=""):
    """{"train": {"lr": 1}} -> {"train.lr": 1}."""
    flat = {}
    for name, value in recipe.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def differing_fields(runs):
    """Names of the recipe fields that are not the same in all runs, in the recipe's order."""
    names = dict.fromkeys(name for run in runs for name in run.recipe)
    return [name for name in names if any(_field(run, name) != _field(runs[0], name) for run in runs)]


def _field(run, name):
    return json.dumps(run.recipe[name], ensure_ascii=False) if name in run.recipe else _NO_VALUE


def collect_lines(runs):
    """{metric: [Line]} of all numbers in the runs' rows, known metrics first."""
    found = {}
    for i, run in enumerate(runs):
        for row in run.rows:
            for key, value in row.items():
                if key in _NOT_PLOTTED or isinstance(value, bool) or not isinstance(value, int | float):
                    continue
                split, name = ("heldout", key[8:]) if key.startswith("heldout/") else ("train", key)
                found.setdefault(name, {}).setdefault((i, split), []).append((row["step"], value))
    lines = {}
    for name in [*METRICS, *sorted(found.keys() - METRICS.keys())]:
        if name in found:
            lines[name] = []
            for (i, split), points in sorted(found[name].items(), key=lambda item: item[0]):
                finite = [point for point in points if math.isfinite(point[1])]
                lines[name].append(Line(i, split, finite, len(points) - len(finite)))
    return lines


# ---- Numbers as text -------------------------------------------------------------------------------------------------

def format_share(value):
    """0.873 -> "87.3 %"."""
    return f"{100 * value:.1f} %"


def _tick_label(value, step, kind):
    if kind == "share":
        return f"{100 * value:.{max(0, -math.floor(math.log10(100 * step) + 1e-9))}f} %"
    if value == 0:
        return "0"
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:g}k"
    return f"{value:.1e}".replace("e-0", "e-") if abs(value) < 1e-4 else f"{value:.6g}"


# ---- Plots -----------------------------------------------------------------------------------------------------------

class Axis(NamedTuple):
    low: float
    high: float
    is_log: bool
    ticks: list
    step: float  # between ticks; of a logarithmic axis 0

    def place(self, value):
        """Position of a value, 0 at the low end and 1 at the high end."""
        if self.is_log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def make_axis(values, kind="number", num_ticks=5):
    """An Axis that holds all values."""
    low, high = min(values), max(values)
    if kind == "logarithmic" and low > 0 and high / low >= _LOG_FROM:
        low, high = low / 1.1, high * 1.1
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        factors = (1, 2, 5) if len(decades) <= 3 else (1,)
        ticks = [factor * 10.0**decade for decade in decades for factor in factors]
        ticks = [tick for tick in ticks if low <= tick <= high]
        return Axis(low, high, True, ticks[::math.ceil(len(ticks) / 7)], 0)
    if kind == "rate":
        low = min(0, low)
    if kind == "share" and high - low < _LEAST_SHARE:
        low = min(max((low + high - _LEAST_SHARE) / 2, 0), 1 - _LEAST_SHARE)
        high = low + _LEAST_SHARE
    elif low == high:
        low, high = (low - abs(low) / 10, high + abs(high) / 10) if low else (0, 1)
    raw = (high - low) / num_ticks
    scale = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * scale for factor in (1, 2, 5, 10) if factor * scale >= raw * 0.999)
    if kind == "steps":
        step = max(1, step)
    else:
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    first = math.ceil(low / step - 1e-9)
    ticks = [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]
    return Axis(low, high, False, ticks, step)


def thin(points, limit=_MAX_POINTS):
    """At most about `limit` of the points, in order: of each stretch its smallest and largest value, and both ends."""
    if len(points) <= limit:
        return points
    stretch = math.ceil(2 * len(points) / limit)
    kept = {0, len(points) - 1}
    for start in range(0, len(points), stretch):
        indices = range(start, min(start + stretch, len(points)))
        kept |= {min(indices, key=lambda i: points[i][1]), max(indices, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


def running_mean(points, num_neighbours):
    """Mean of every point and num_neighbours on each side of it, or as many as there are."""
    sums = [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    smooth = []
    for i, (step, _) in enumerate(points):
        start, end = max(0, i - num_neighbours), min(len(points), i + num_neighbours + 1)
        smooth.append((step, (sums[end] - sums[start]) / (end - start)))
    return smooth


def draw_plot(name, lines, num_runs, refresh_steps):
    """A <figure> with the curves of one metric. refresh_steps: {run: [steps at which the student answered anew]}."""
    metric = METRICS.get(name, Metric(name, "as in metrics.jsonl"))
    if name.startswith("reason/"):
        metric = Metric(f"Judged {name[7:].replace('_', ' ')}", "answers of a rollout", "rate")
    notes = []
    num_not_finite = sum(line.num_not_finite for line in lines)
    if num_not_finite:
        notes.append(f"{num_not_finite} value{'s' if num_not_finite > 1 else ''} not finite, not drawn")
    lines = [line for line in lines if line.points]
    if not lines:
        return _figure(metric, "", "", notes)
    x_axis = make_axis([step for line in lines for step, _ in line.points] + [0], "steps")
    y_axis = make_axis([value for line in lines for _, value in line.points], metric.kind)

    def place(point):
        x = _LEFT + x_axis.place(point[0]) * (_PLOT_WIDTH - _LEFT - _RIGHT)
        y = _PLOT_HEIGHT - _BOTTOM - y_axis.place(point[1]) * (_PLOT_HEIGHT - _TOP - _BOTTOM)
        return x, y

    parts = [_draw_axes(x_axis, y_axis, metric, place)]
    for i in sorted({line.run for line in lines}):
        for step in refresh_steps.get(i, ()):
            if x_axis.low <= step <= x_axis.high:
                x = place((step, y_axis.low))[0]
                parts.append(f'<line class="refresh c{i % _NUM_COLOURS}" data-run="{i}" x1="{x:.1f}" x2="{x:.1f}" '
                             f'y1="{_TOP}" y2="{_PLOT_HEIGHT - _BOTTOM}"/>')
    ends = []
    for line in lines:
        smooth = None
        if line.split == "train" and len(line.points) >= _SMOOTH_FROM and name not in _NEVER_SMOOTHED:
            smooth = running_mean(line.points, len(line.points) // 60)
        parts.append(_draw_line(line, smooth, place))
        ends.append((line, (smooth or line.points)[-1]))
    if num_runs > 1:
        parts.append(_draw_end_labels(ends, place))
    if y_axis.is_log:
        notes.insert(0, "logarithmic axis")
    span = f"{x_axis.low!r},{x_axis.high!r}"
    return _figure(metric, "".join(parts), span, notes)


def _figure(metric, drawing, span, notes):
    note = f"<small>{escape('; '.join(notes))}</small>" if notes else ""
    return (f'<figure><figcaption><b>{escape(metric.title)}</b> <span>{escape(metric.unit)}</span></figcaption>'
            f'<svg viewBox="0 0 {_PLOT_WIDTH} {_PLOT_HEIGHT}" role="img" aria-label="{escape(metric.title)}" '
            f'data-kind="{metric.kind}" data-span="{span}">{drawing}</svg>{note}</figure>')


def _draw_axes(x_axis, y_axis, metric, place):
    left, right, bottom = _LEFT, _PLOT_WIDTH - _RIGHT, _PLOT_HEIGHT - _BOTTOM
    parts = []
    for tick in y_axis.ticks:
        y = place((x_axis.low, tick))[1]
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
                     f'<text class="tick" x="{left - 5}" y="{y + 3.5:.1f}" text-anchor="end">'
                     f'{_tick_label(tick, y_axis.step, metric.kind)}</text>')
    for tick in x_axis.ticks:
        x = place((tick, y_axis.low))[0]
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>'
                     f'<text class="tick" x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">'
                     f'{_tick_label(tick, x_axis.step, "steps")}</text>')
    parts.append(f'<line class="axis" x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>'
                 f'<text class="tick" x="{(left + right) / 2}" y="{bottom + 29}" text-anchor="middle">step</text>')
    return "".join(parts)


def _draw_line(line, smooth, place):
    """Points of the first polyline are those of data-points, one by one: the script relies on it."""
    points = thin(line.points)
    data = json.dumps([[step, float(f"{value:.9g}")] for step, value in points], separators=(",", ":"))
    parts = [_polyline(points, place, "raw" if smooth else "")]
    if smooth:
        parts.append(_polyline(thin(smooth), place, ""))
    if line.split == "heldout" or len(points) == 1:
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.4"/>' for x, y in map(place, points[:80])]
    return (f'<g class="line {line.split} c{line.run % _NUM_COLOURS}" data-run="{line.run}" data-split="{line.split}" '
            f'data-points="{data}">{"".join(parts)}</g>')


def _polyline(points, place, css_class):
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, points))
    return f'<polyline class="{css_class}" points="{places}"/>'


def _draw_end_labels(ends, place):
    """The run's number at the end of its curve, apart from one another: colour is not the only clue."""
    places = {}
    for line, end in ends:  # one label for both curves of a run
        if line.run not in places or line.split == "train":
            places[line.run] = place(end)
    taken, parts = [], []
    for run, (x, y) in sorted(places.items(), key=lambda item: item[1][1]):
        while any(abs(x - other_x) < 12 and abs(y - other_y) < 9 for other_x, other_y in taken):
            y += 1
        taken.append((x, y))
        parts.append(f'<text class="end c{run % _NUM_COLOURS}" data-run="{run}" x="{x + 5:.1f}" y="{y + 3:.1f}">'
                     f'{run + 1}</text>')
    return "".join(parts)


def refresh_steps_of(run):
    """Steps at which the student answered anew. None where they are not known: in an unfinished run of N epochs."""
    num_steps = run.done["step"] if run.done else run.recipe.get("train.steps")
    return [round(share * num_steps) for share in run.recipe.get("kd.refresh_at") or ()] if num_steps else []


# ---- Tables ----------------------------------------------------------------------------------------------------------

def heldout_numbers(run):
    """({metric: number} before training, the same after it or at the last validation so far; {} where not known)."""
    if run.evaluation:
        return {}, {}  # nothing was trained
    if run.done:
        return run.done.get("before", {}), run.done.get("after", {})
    rows = [{name[8:]: value for name, value in row.items() if name.startswith("heldout/")} for row in run.rows]
    rows = [row for row in rows if row]
    return rows[0] if rows else {}, rows[-1] if len(rows) > 1 else {}


def _before_after(run, name):
    before, after = (numbers.get(name) for numbers in heldout_numbers(run))
    if before is None and after is None:
        return _NO_VALUE
    metric = METRICS.get(name, Metric(name, ""))
    change = ""
    if isinstance(before, int | float) and isinstance(after, int | float):
        change = f"{100 * (after - before):+.1f} points" if metric.kind == "share" else f"{after - before:+.4f}"
    texts = [_NO_VALUE if value is None else format_share(value) if metric.kind == "share" else
             f"{value:.4f}" if isinstance(value, int | float) else escape(str(value)) for value in (before, after)]
    return f"{texts[0]} → <b>{texts[1]}</b> <i>{change.replace('-', '−')}</i>"


def _status(run):
    text = '<b class="finished">finished</b>' if run.done else '<b class="unfinished">unfinished</b>'
    if not run.rows and not run.evaluation:
        text += " <i>no metrics yet</i>"
    if run.num_unreadable:
        lines = "1 unreadable line" if run.num_unreadable == 1 else f"{run.num_unreadable} unreadable lines"
        text += f" <i>{lines} of metrics.jsonl left out</i>"
    return text


def _any_training(runs):
    return any(run.evaluation is None for run in runs)


def _score(run, benchmark):
    found = (run.evaluation or {"benchmarks": {}})["benchmarks"].get(benchmark)
    return f"<b>{found['score']:.2f}</b> <i>± {found['stderr']:.2f}</i>" if found else _NO_VALUE


def _steps(run):
    last = run.done["step"] if run.done else max((row["step"] for row in run.rows), default=0)
    planned = run.recipe.get("train.steps")
    text = f"{last:,}" if run.done or not planned else f"{last:,} of {planned:,}"
    return text + (f" <i>best validation at {run.best_step:,}</i>" if run.best_step is not None else "")


def _tokens(run):
    tokens = [row["num_tokens"] for row in run.rows if isinstance(row.get("num_tokens"), int)]
    return f"{max(tokens):,}" if tokens else _NO_VALUE


def _wall_time(run):
    if run.done and "seconds" in run.done:
        return format_seconds(run.done["seconds"])
    times = [row["time"] for row in run.rows if isinstance(row.get("time"), int | float)]
    return f"{format_seconds(max(times) - min(times))} <i>so far, between metrics</i>" if times else _NO_VALUE


def _peak_memory(run):
    values = [row["memory_gib"] for row in run.rows if isinstance(row.get("memory_gib"), int | float)]
    peak = (run.done or {}).get("peak_memory_gib", max(values, default=None))
    return _NO_VALUE if peak is None else f"{peak:.2f} GiB"


def _median_throughput(run):
    rates = sorted(row["tokens_per_s"] for row in run.rows if isinstance(row.get("tokens_per_s"), int | float))
    return f"{rates[len(rates) // 2]:,.0f} tokens/s" if rates else _NO_VALUE


def _refresh(run, i):
    if i >= len(run.refreshes):
        return _NO_VALUE
    answers, annotations = run.refreshes[i]
    parts = []
    if {"answers", "truncated", "seconds"} <= answers.keys():
        truncated = answers["truncated"] / max(1, answers["answers"])
        parts.append(f"{answers['answers']:,} answers, {format_share(truncated)} truncated, "
                     f"{format_seconds(answers['seconds'])}")
    if {"supervised_tokens", "seconds"} <= annotations.keys():
        parts.append(f"{annotations['supervised_tokens']:,} tokens annotated, {format_seconds(annotations['seconds'])}")
    return "; ".join(parts) or "under way"


def _environment(run):
    env = run.environment
    packages = env.get("packages") if isinstance(env.get("packages"), dict) else {}
    words = [f"{env['device']}" if "device" in env else "", f"{env['cores']} cores" if "cores" in env else "",
             str(env.get("precision", "")), f"{env['mode']} mode" if "mode" in env else "",
             f"{env['kernels']} kernels" if "kernels" in env else "",
             *(f"{name} {packages[name]}" for name in ("mindspore", "numpy") if name in packages)]
    return escape(", ".join(word for word in words if word) or _NO_VALUE)


def draw_table(runs):
    """Runs as columns: what they are, what came out, and where their recipes differ."""
    differing = differing_fields(runs)
    rows = [(name, [escape(str(run.recipe.get(name, _NO_VALUE))) for run in runs], name in differing)
            for name in ("recipe", "scale")]
    facts = {"status": _status, "steps": _steps, "tokens seen": _tokens, "wall time": _wall_time,
             "peak memory": _peak_memory, "median throughput": _median_throughput}
    if not _any_training(runs):
        facts = {label: facts[label] for label in ("status", "wall time", "peak memory")}
    rows += [(label, [describe(run) for run in runs], False) for label, describe in facts.items()]
    benchmarks = dict.fromkeys(name for run in runs if run.evaluation for name in run.evaluation["benchmarks"])
    if benchmarks:
        rows.append(("<b>benchmarks, %</b>", ["" for _ in runs], False))
    rows += [(escape(name), [_score(run, name) for run in runs], False) for name in benchmarks]
    names = dict.fromkeys(name for run in runs for numbers in heldout_numbers(run) for name in numbers)
    if names:
        rows.append(("<b>held-out, before → after</b>", ["" for _ in runs], False))
    for name in sorted(names, key=lambda name: [*METRICS, name].index(name)):
        metric = METRICS.get(name, Metric(name, ""))
        title = metric.title if metric.title.startswith(("KL", name)) else metric.title[0].lower() + metric.title[1:]
        unit = "" if metric.kind == "share" or not metric.unit else f" <small>{escape(metric.unit)}</small>"
        rows.append((escape(title.replace("held-out ", "")) + unit, [_before_after(run, name) for run in runs], False))
    rows += [(f"refresh {i + 1}", [_refresh(run, i) for run in runs], False)
             for i in range(max(len(run.refreshes) for run in runs))]
    rows.append(("environment", [_environment(run) for run in runs], False))
    rows += [(f"<code>{escape(name)}</code>", [f"<code>{escape(_field(run, name))}</code>" for run in runs], True)
             for name in differing if name not in ("recipe", "scale", "run.root", "run.dir")]
    caption = "" if len(runs) == 1 else ('<p class="hint">Highlighted: the recipes differ.</p>' if differing else
                                         '<p class="hint">The recipes are the same in every field.</p>')
    names = dict.fromkeys(name for run in runs for name in run.recipe)
    full = [(f"<code>{escape(name)}</code>", [f"<code>{escape(_field(run, name))}</code>" for run in runs],
             name in differing) for name in names]
    return (f"{caption}{_table(runs, rows)}<details><summary>All {len(names)} fields of the recipe"
            f"{'s' if len(runs) > 1 else ''}</summary>{_table(runs, full)}</details>")


def _table(runs, rows):
    """rows: (label HTML, one cell's HTML per run, whether the recipes differ in it)."""
    head = "".join(f'<th scope="col" data-run="{i}">{_run_chip(i)}{escape(run.name)}</th>'
                   for i, run in enumerate(runs))
    body = "".join(
        f'<tr{" class=differs" if differs else ""}><th scope="row">{label}</th>' +
        "".join(f'<td data-run="{i}">{cell}</td>' for i, cell in enumerate(cells)) + "</tr>"
        for label, cells, differs in rows)
    return f'<div class="wide"><table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _run_chip(i):
    return f'<span class="chip c{i % _NUM_COLOURS}">{i + 1}</span>'


# ---- Sample answers --------------------------------------------------------------------------------------------------

def draw_samples(runs):
    """A card per prompt: each run's answer at its first and last validation."""
    cards = {}
    for i, run in enumerate(runs):
        for step, samples in run.samples.items():
            for sample in samples:
                cards.setdefault((sample["prompt"], sample["value"]), {}).setdefault(i, {})[step] = sample
    if not cards:
        return "<p>None: these runs have no validation with answers that can be verified yet.</p>"
    drawn = [_draw_card(runs, prompt, value, answers) for (prompt, value), answers in cards.items()]
    shown, rest = drawn[:_NUM_OPEN_SAMPLES], drawn[_NUM_OPEN_SAMPLES:]
    more = f"<details><summary>{len(rest)} more prompts</summary>{''.join(rest)}</details>" if rest else ""
    return f'<ul class="hint">{"".join(_count_right(i, run) for i, run in enumerate(runs))}</ul>{"".join(shown)}{more}'


def _count_right(i, run):
    counts = [f"{sum(sample['correct'] for sample in samples)} of {len(samples)} at step {step:,}"
              for step, samples in run.samples.items()]
    return f'<li data-run="{i}">{_run_chip(i)}right: {" → ".join(counts) or "no answers yet"}</li>'


def _draw_card(runs, prompt, value, answers):
    parts = [f'<article><p class="prompt">{_show_text(prompt)}</p>'
             f'<p class="expected">expected <b>{escape(value)}</b></p>']
    for i, by_step in answers.items():
        name = f'<p class="name">{_run_chip(i)}{escape(runs[i].name)}</p>' if len(runs) > 1 else ""
        cells = [_draw_answer(step, by_step[step]) for step in sorted(by_step)]
        if len(cells) == 1:
            cells.append('<div class="answer"><p class="verdict">no second validation</p></div>')
        parts.append(f'<section data-run="{i}">{name}<div class="pair">{"".join(cells)}</div></section>')
    return "".join(parts) + "</article>"


def _draw_answer(step, sample):
    verdict = '<b class="right">✓ right</b>' if sample["correct"] else '<b class="wrong">✗ wrong</b>'
    cut = " · truncated" if sample["truncated"] else ""
    return (f'<div class="answer"><p class="verdict">step {step:,} · {verdict}{cut}</p>'
            f'<p class="text">{_show_text(sample["answer"]) or "<i>empty</i>"}</p></div>')


def _show_text(text):
    """Escaped, with the tokenizer's special pieces set back."""
    return re.sub(r"\[unused\d+\]|&lt;/?s&gt;", lambda piece: f"<s>{piece.group()}</s>", escape(text))


# ---- The page --------------------------------------------------------------------------------------------------------

def draw_report(runs):
    """The whole HTML page of a list of Runs."""
    differing = [name for name in differing_fields(runs) if not name.startswith(("run.", "recipe", "scale"))]
    legend = "".join(_legend_entry(i, run, differing) for i, run in enumerate(runs))
    heading = escape(runs[0].name) if len(runs) == 1 else f"{len(runs)} runs"
    # Only this very script may run, whatever a sample text holds.
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    title = "mindpangu: " + ", ".join(run.name for run in runs)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>
<style>{STYLE}</style></head><body>
<h1>mindpangu <span>{heading}</span></h1>
{f"<nav>{legend}</nav>" if len(runs) > 1 else ""}
<h2>Results</h2>
{draw_table(runs)}
{_draw_evaluations(runs)}
{_draw_training(runs) if _any_training(runs) else ""}
<div id="tip" hidden></div>
<script>{_SCRIPT}</script></body></html>
"""


def _draw_training(runs):
    """Curves, sample answers and rollouts."""
    lines = collect_lines(runs)
    refresh_steps = {i: refresh_steps_of(run) for i, run in enumerate(runs)}
    plots = "".join(draw_plot(name, lines[name], len(runs), refresh_steps) for name in lines)
    refresh_key = ('<span class="key"><svg viewBox="0 0 28 8"><line class="refresh" x1="14" x2="14" y1="-2" y2="10"/>'
                   '</svg>the student answers anew</span>' if any(refresh_steps.values()) else "")
    smooth_key = ('<span class="key">long curves: bold a running mean over a thirtieth of the curve, faint every value'
                  '</span>' if 'class="raw"' in plots else "")
    return f"""<h2>Curves</h2>
<p class="hint">
<span class="key"><svg viewBox="0 0 28 8"><line x1="0" x2="28" y1="4" y2="4"/></svg>training</span>
<span class="key"><svg viewBox="0 0 28 8"><line class="dashed" x1="0" x2="28" y1="4" y2="4"/>
<circle cx="14" cy="4" r="2.6"/></svg>held-out</span>{refresh_key}{smooth_key}
<span class="key">tokens: those with a label</span></p>
<div class="plots">{plots or "<p>No metrics yet.</p>"}</div>
<h2>Sample answers</h2>
{draw_samples(runs)}
{_draw_rollouts(runs)}"""


def _draw_evaluations(runs):
    return "".join(f'<section data-run="{i}">{as_html(run.evaluation)}</section>' for i, run in enumerate(runs)
                   if run.evaluation)


def _draw_rollouts(runs):
    drawn = [f'<section data-run="{i}">{report_grpo.draw_grpo(run.name, run.pass_rates, run.transcripts)}</section>'
             for i, run in enumerate(runs) if run.pass_rates or run.transcripts]
    return "<h2>Rollouts</h2>" + "".join(drawn) if drawn else ""


def _legend_entry(i, run, differing):
    """differing: names of the fields that tell the runs apart, shown where they are few."""
    fields = ", ".join(f"{name.split('.')[-1]} {_field(run, name)}" for name in differing).replace('"', "")
    short = "" if len(differing) > 6 else fields if len(fields) <= 64 else fields[:61] + "…"
    return (f'<label><input type="checkbox" checked data-toggle="{i}">{_run_chip(i)}<span>{escape(run.name)}'
            f'<i>{escape(short)}</i></span></label>')


# Okabe and Ito's colours (jfly.uni-koeln.de/color), told apart with every common colour blindness; black and blue are
# lighter on a dark page, yellow is left out because it vanishes on a light one.
STYLE = """
:root{color-scheme:light dark;--page:#fff;--card:#f7f7f8;--ink:#1d1f22;--soft:#61666d;--rule:#dfe1e4;--mark:#fff3cf;
--c0:#0072b2;--c1:#d55e00;--c2:#009e73;--c3:#c9619b;--c4:#e69f00;--c5:#56b4e9;--c6:#3c3f44;--right:#00795a;--wrong:#b84f00}
@media(prefers-color-scheme:dark){:root{--page:#16181b;--card:#1e2125;--ink:#e6e7e9;--soft:#9ba1a9;--rule:#363b41;
--mark:#443a14;--c0:#3f9fdd;--c1:#ee7a24;--c2:#1cb98d;--c3:#dc8bb9;--c6:#c3c7cc;--right:#35c79d;--wrong:#f08b3e}}
*{box-sizing:border-box}
body{margin:0 auto;padding:20px 28px 60px;max-width:1480px;background:var(--page);color:var(--ink);
font:14px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","DejaVu Sans","Noto Sans CJK SC",sans-serif}
h1{font-size:22px;margin:0 0 10px}h1 span{color:var(--soft);font-weight:400}
h2{font-size:16px;margin:28px 0 10px}
.c0{--c:var(--c0)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}.c3{--c:var(--c3)}.c4{--c:var(--c4)}.c5{--c:var(--c5)}.c6{--c:var(--c6)}
nav{position:sticky;top:0;z-index:3;display:flex;flex-wrap:wrap;gap:6px 18px;padding:8px 0;background:var(--page);
border-bottom:1px solid var(--rule)}
nav label{display:flex;align-items:center;gap:2px;cursor:pointer}
nav label>span:last-child{display:block;line-height:1.25}
nav i{display:block;color:var(--soft);font-size:12px}nav input{margin:0 6px 0 0}
.chip{flex:none;display:inline-block;min-width:19px;padding:0 5px;margin-right:7px;border-radius:10px;
background:var(--c);color:var(--page);font-size:12px;font-weight:700;text-align:center;line-height:19px}
.hint{color:var(--soft);margin:0 0 10px;padding:0;list-style:none}.hint li{display:inline-block;margin-right:22px}
.key{display:inline-block;margin-right:22px}.key svg{width:28px;height:8px;margin-right:7px;overflow:visible}
.key line{stroke:var(--soft);stroke-width:1.8}.key circle{fill:var(--soft)}.dashed{stroke-dasharray:4 3}
.wide{overflow-x:auto;max-width:100%}table{border-collapse:collapse}
th,td{padding:4px 14px 4px 8px;text-align:left;vertical-align:top;border-bottom:1px solid var(--rule)}
thead th{min-width:150px}td{min-width:150px;max-width:420px;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
tbody th{font-weight:400;color:var(--soft);position:sticky;left:0;background:var(--page);white-space:nowrap}
tbody th b{color:var(--ink)}
.differs th,.differs td{background:var(--mark);color:var(--ink)}
i{color:var(--soft);font-style:normal}td i{font-size:12px}small{color:var(--soft)}
code{font:12.5px ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
.finished{color:var(--right)}.unfinished{color:var(--wrong)}
details{margin:10px 0}summary{cursor:pointer;color:var(--soft);padding:4px 0}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,400px),1fr));gap:14px}
@media(max-width:880px){body{padding:14px 16px 40px}nav{position:static!important}tbody th{white-space:normal!important}
tbody th small{display:block}.tick,.end{font-size:11px!important}
.plots{grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr))}}
figure{margin:0;padding:10px 12px 8px;background:var(--card);border-radius:8px;min-width:0}
figcaption span{display:block;color:var(--soft);font-size:12.5px}figure small{display:block}
figure svg{display:block;width:100%;height:auto;margin-top:4px;touch-action:pan-y}
.grid{stroke:var(--rule)}.axis{stroke:var(--soft)}.tick{fill:var(--soft);font-size:9.5px}
.line polyline{fill:none;stroke:var(--c);stroke-width:1.7;stroke-linejoin:round;stroke-linecap:round}
.line .raw{stroke-width:.8;opacity:.25}.line circle{fill:var(--c)}
.heldout polyline{stroke-dasharray:4 3.5}.refresh{stroke:var(--c,var(--soft));stroke-dasharray:1.5 2.5;opacity:.8}
.end{fill:var(--c);font-size:9.5px;font-weight:700;paint-order:stroke;stroke:var(--card);stroke-width:2.5px}
.cursor{stroke:var(--soft);stroke-width:.7}.spot{fill:var(--card);stroke:var(--c);stroke-width:1.6}
#tip{position:absolute;z-index:4;pointer-events:none;padding:6px 9px;background:var(--page);
border:1px solid var(--rule);border-radius:6px;box-shadow:0 3px 12px #0003;font-size:12.5px;white-space:pre;
font-variant-numeric:tabular-nums}
article{padding:12px 14px;margin:0 0 12px;background:var(--card);border-radius:8px}article p{margin:0 0 6px}
.prompt,.text{white-space:pre-wrap;overflow-wrap:anywhere}.text{max-height:15em;overflow-y:auto}
article s{text-decoration:none;color:var(--soft);opacity:.75;font-size:.82em}
.expected,.verdict{color:var(--soft)}.expected b{color:var(--ink)}.right{color:var(--right)}.wrong{color:var(--wrong)}
.name{margin-top:10px!important}.pair{display:grid;grid-template-columns:1fr 1fr;gap:10px}
.answer{min-width:0;padding:7px 10px;background:var(--page);border:1px solid var(--rule);border-radius:6px}
.answer p:last-child{margin:0}
@media(max-width:480px){.pair{grid-template-columns:1fr}}
@media print{nav{position:static}}
.off{display:none!important}
""" + report_grpo.STYLE

# Hovering shows every visible curve's value at its point nearest to the pointer; the checkboxes hide and show runs.
_SCRIPT = """
const tip = document.getElementById('tip'), svgName = 'http://www.w3.org/2000/svg';
const show = (value, kind) => kind === 'share' ? (100 * value).toFixed(2) + ' %' :
  Math.abs(value) >= 1000 ? Math.round(value).toLocaleString('en') :
  value !== 0 && Math.abs(value) < 1e-3 ? value.toExponential(3) : String(Number(value.toPrecision(5)));
for (const svg of document.querySelectorAll('svg[data-span]')) {
  const [low, high] = svg.dataset.span.split(',').map(Number);
  const lines = [...svg.querySelectorAll('.line')].map(g => ({g, points: JSON.parse(g.dataset.points)}));
  const clear = () => { svg.querySelectorAll('.cursor,.spot').forEach(e => e.remove()); tip.hidden = true; };
  const add = (name, attributes) => {
    const e = svg.appendChild(document.createElementNS(svgName, name));
    for (const key in attributes) e.setAttribute(key, attributes[key]);
  };
  svg.addEventListener('pointerleave', clear);
  svg.addEventListener('pointermove', event => {
    clear();
    const x = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse()).x;
    if (x < LEFT - 6 || x > RIGHT + 10) return;
    const step = low + (x - LEFT) / (RIGHT - LEFT) * (high - low);
    add('line', {class: 'cursor', x1: x, x2: x, y1: TOP, y2: BOTTOM});
    const rows = [];
    for (const {g, points} of lines) {
      if (g.classList.contains('off')) continue;
      let best = 0;
      points.forEach((p, i) => { if (Math.abs(p[0] - step) < Math.abs(points[best][0] - step)) best = i; });
      const place = g.querySelector('polyline').points[best];
      add('circle', {class: 'spot ' + [...g.classList].pop(), cx: place.x, cy: place.y, r: 3.2});
      rows.push((Number(g.dataset.run) + 1) + '  ' + (g.dataset.split === 'train' ? 'training' : 'held-out') +
                '  step ' + points[best][0].toLocaleString('en') + '  ' + show(points[best][1], svg.dataset.kind));
    }
    if (!rows.length) return;
    tip.textContent = rows.join('\\n');
    tip.hidden = false;
    const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
    tip.style.left = Math.max(4, Math.min(event.pageX + 14, room)) + 'px';
    tip.style.top = (event.pageY + 16) + 'px';
  });
}
for (const box of document.querySelectorAll('[data-toggle]')) box.addEventListener('change', () => {
  for (const e of document.querySelectorAll('[data-run="' + box.dataset.toggle + '"]'))
    e.classList.toggle('off', !box.checked);
});
""".replace("LEFT", str(_LEFT)).replace("RIGHT", str(_PLOT_WIDTH - _RIGHT)).replace("TOP", str(_TOP)).replace(
    "BOTTOM", str(_PLOT_HEIGHT - _BOTTOM))


def main(arguments=None):
    """The command line. Exits with 1 and one line on stderr if a run folder is not one."""
    parser = argparse.ArgumentParser(prog="python -m mindpangu.tools.report", description=__doc__.split("\n", 1)[1])
    parser.add_argument("runs", nargs="+", metavar="RUN",
                        help="run folder, for example runs/kd_student-tiny-0f6501d644")
    parser.add_argument("-o", "--output", metavar="FILE",
                        help="default: report.html in the run folder, or in the current folder if there are several")
    options = parser.parse_args(arguments)
    output = Path(options.output or (Path(options.runs[0], "report.html") if len(options.runs) == 1 else "report.html"))
    try:
        runs = [read_run(folder) for folder in options.runs]
        # "replace": a sample may hold half of a surrogate pair, which UTF-8 can't express.
        output.write_bytes(draw_report(runs).encode("utf-8", "replace"))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    print(f"{len(runs)} run{'s' if len(runs) > 1 else ''}: {output}")


if __name__ == "__main__":
    main()
