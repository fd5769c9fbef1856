"""The report of a curation: what went in and out of each stage, what was dropped and why, as one HTML file."""

import itertools
import json
from collections import Counter
from html import escape

import numpy as np

from mindpangu.data.sources import script_shares

from .report import STYLE

_WIDTH, _HEIGHT, _BASE, _TOP = 420, 190, 150, 14  # SVG units of a histogram; _BASE: where the bars stand
_NUM_EXAMPLES = 3  # of each reason
_SHOWN_CHARS = 1200
_NUM_SCANNED = 5000  # documents in which letters are counted


def draw_curation(name, summary, pool, numbers, read_stage):
    """The page. summary: summary.json; numbers: int64, the documents kept; read_stage(stage) -> its findings."""
    stages = summary["stages"]
    kept = numbers.size
    head = [("documents read", f"{len(pool):,}"), ("malformed", f"{summary['malformed']:,}"),
            ("kept", f"{kept:,} ({100 * kept / max(1, len(pool)):.1f} %)"),
            ("wall time of this start", f"{summary['seconds']:,.1f} s"),
            ("peak memory", f"{summary['peak_memory_gib']:.2f} GiB")]
    rows = summary.get("rows")
    if rows:
        head.append(("rows", f"{rows['rows']:,} of {rows['seq_len']:,} tokens, fill {100 * rows['fill']:.1f} %"))
    facts = "".join(f"<tr><th scope=row>{escape(label)}</th><td>{escape(value)}</td></tr>" for label, value in head)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>mindpangu: {escape(name)}</title>
<style>{STYLE}{_OWN_STYLE}</style></head><body>
<h1>mindpangu <span>{escape(name)}</span></h1>
<div class="wide"><table><tbody>{facts}</tbody></table></div>
<h2>Flow</h2>
{_draw_flow(stages, len(pool))}
<h2>What the documents are, before and after</h2>
<div class="plots">{_draw_histograms(pool, numbers)}</div>
{_draw_mixture(summary.get("mixture"), rows)}
<h2>Examples of what was dropped</h2>
{"".join(_draw_examples(stage, pool, read_stage(stage)) for stage in stages) or "<p>Nothing was.</p>"}
</body></html>
"""


def _draw_flow(stages, total):
    rows = []
    for stage in stages:
        left = 100 * stage["out"] / max(1, total)
        parts = [f'<span class="left" style="width:{left:.2f}%"></span>']
        for place, (reason, count) in enumerate(_by_count(stage["dropped"])):
            parts.append(f'<span class="lost c{1 + place % 5}" style="width:{100 * count / max(1, total):.2f}%" '
                         f'title="{escape(reason)}: {count:,}"></span>')
        why = "".join(f'<li><span class="chip c{1 + place % 5}">{count:,}</span>{escape(reason.replace("_", " "))}</li>'
                      for place, (reason, count) in enumerate(_by_count(stage["dropped"])))
        told = "".join(f'<li>{count:,} {escape(reason.replace("_", " "))}, reported only</li>'
                       for reason, count in _by_count(stage["reported"]))
        rows.append(f'<tr><th scope="row">{escape(stage["name"].replace("_", " "))}</th><td>{stage["in"]:,}</td>'
                    f'<td>{stage["in"] - stage["out"]:,}</td><td><b>{stage["out"]:,}</b></td>'
                    f'<td>{stage["seconds"]:,.1f} s</td><td class="bar"><div>{"".join(parts)}</div></td>'
                    f'<td><ul>{why}{told}</ul></td></tr>')
    return ('<div class="wide"><table class="flow"><thead><tr><th>stage</th><th>in</th><th>dropped</th><th>out</th>'
            f'<th>time</th><th>share of all that were read</th><th>why</th></tr></thead><tbody>{"".join(rows)}</tbody>'
            "</table></div>")


def _by_count(counts):
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


# ---- Histograms ------------------------------------------------------------------------------------------------------

def _draw_histograms(pool, numbers):
    everything = np.arange(len(pool))
    return (_draw_lengths(pool.char_counts_N, pool.char_counts_N[numbers]) +
            _draw_bars("Scripts", f"% of the letters, of up to {_NUM_SCANNED:,} documents", _scripts(pool, everything),
                       _scripts(pool, numbers)) +
            _draw_bars("Languages", "% of the documents", _shares(pool.languages_N, pool.languages),
                       _shares(pool.languages_N[numbers], pool.languages)) +
            _draw_bars("Sources", "% of the documents", _shares(pool.sources_N, [s["name"] for s in pool.sources]),
                       _shares(pool.sources_N[numbers], [s["name"] for s in pool.sources])))


def _scripts(pool, numbers):
    chosen = numbers[:: max(1, numbers.size // _NUM_SCANNED)]
    total = Counter()
    for number in chosen.tolist():
        total.update(script_shares(pool.text(number)))
    return {script: share / max(1e-9, total.total()) for script, share in total.items()}


def _shares(values, names):
    counts = np.bincount(values, minlength=len(names))
    return {name: count / max(1, values.size) for name, count in zip(names, counts.tolist(), strict=True)}


def _draw_lengths(before, after):
    """Documents by characters, in classes that double; of each, the share of its own total."""
    classes = [np.bincount(np.log2(np.maximum(counts, 1)).astype(int), minlength=1) for counts in (before, after)]
    first = min(int(np.flatnonzero(counts)[0]) for counts in classes if counts.any())
    last = max(counts.size for counts in classes)
    shares = [{_thousands(1 << k): counts[k] / counts.sum() if k < counts.size else 0.0 for k in range(first, last)}
              for counts in classes]
    return _draw_bars("Lengths", "% of the documents, by characters from so many on to the next", *shares, order=False)


def _thousands(value):
    return f"{value / 1e6:.3g}M" if value >= 1e6 else f"{value / 1e3:.3g}k" if value >= 1e4 else str(value)


def _draw_bars(title, unit, before, after, order=True, limit=14):
    """Pairs of bars, pale before and coloured after. before, after: {label: share}."""
    labels = list(before)
    if order:
        labels = sorted(set(before) | set(after), key=lambda label: (-before.get(label, 0), label))
    more = len(labels) - limit if order and len(labels) > limit else 0
    labels = labels[:limit] if order else labels
    highest = max([before.get(label, 0) for label in labels] + [after.get(label, 0) for label in labels] + [1e-9])
    step, parts = (_WIDTH - 20) / max(1, len(labels)), []
    width = min(26.0, step * 0.4)
    for place, label in enumerate(labels):
        middle = 10 + (place + 0.5) * step
        for side, (shares, when) in enumerate(((before, "before"), (after, "after"))):
            share = shares.get(label, 0)
            height = (_BASE - _TOP) * share / highest
            parts.append(f'<rect class="{when}" x="{middle + (side - 1) * width:.1f}" y="{_BASE - height:.1f}" '
                         f'width="{width:.1f}" height="{height:.1f}">'
                         f"<title>{escape(label)}, {when}: {100 * share:.2f} %</title></rect>")
        top = _BASE - (_BASE - _TOP) * max(before.get(label, 0), after.get(label, 0)) / highest
        if len(labels) <= 8:
            parts.append(f'<text class="tick" x="{middle:.1f}" y="{top - 3:.1f}" text-anchor="middle">'
                         f'{100 * before.get(label, 0):.0f} → {100 * after.get(label, 0):.0f}</text>')
        turn = f' transform="rotate(-35 {middle:.1f} {_BASE + 13})"' if len(labels) > 8 else ""
        parts.append(f'<text class="tick" x="{middle:.1f}" y="{_BASE + 13}" '
                     f'text-anchor="{"end" if turn else "middle"}"{turn}>{escape(label[:18])}</text>')
    note = f"<small>and {more:,} more</small>" if more else ""
    return (f'<figure><figcaption><b>{escape(title)}</b> <span>{escape(unit)}; pale before, coloured after</span>'
            f'</figcaption><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">'
            f'{"".join(parts)}</svg>{note}</figure>')


# ---- The mixture and examples ----------------------------------------------------------------------------------------

def _draw_mixture(mixture, rows):
    if not mixture:
        return ""
    body = "".join(
        f'<tr><th scope="row">{escape(part["name"])}</th><td>{100 * part["wanted"]:.2f} %</td>'
        f'<td>{100 * part["share"]:.2f} %</td><td>{100 * part["window_error"]:.2f} %</td>'
        f'<td>{part["num_samples"]:,}</td><td>{part["epochs"]:.2f}</td></tr>' for part in mixture)
    return ('<h2>Mixture</h2><p class="hint">Largest error: over all windows of 10,000 samples in a row.</p>'
            '<div class="wide"><table><thead><tr><th>category</th><th>wanted</th><th>share</th><th>largest error</th>'
            f'<th>samples</th><th>epochs</th></tr></thead><tbody>{body}</tbody></table></div>')


def _draw_examples(stage, pool, findings):
    """The first few of every reason, beside what they were dropped for."""
    by_reason = {}
    for finding in findings:
        shown = by_reason.setdefault(finding.reason, [])
        if len(shown) < _NUM_EXAMPLES:
            shown.append(finding)
        elif all(len(by_reason.get(reason, ())) == min(_NUM_EXAMPLES, count)
                 for reason, count in itertools.chain(stage["dropped"].items(), stage["reported"].items())):
            break
    parts = []
    for reason, shown in by_reason.items():
        count = stage["dropped"].get(reason, stage["reported"].get(reason))
        cards = "".join(_draw_example(pool, finding) for finding in shown)
        parts.append(f'<details><summary>{escape(stage["name"].replace("_", " "))}: {count:,} '
                     f'{escape(reason.replace("_", " "))}</summary>{cards}</details>')
    return "".join(parts)


def _draw_example(pool, finding):
    file, line = pool.place(finding.document)
    score = "" if finding.score is None else f" · score {finding.score:.4g}"
    where = f'<p class="verdict">{escape(file)}:{line}{score}</p>'
    answers = [f'<div class="answer">{where}<p class="text">{_excerpt(pool.text(finding.document), finding)}</p></div>']
    if isinstance(finding.partner, int):
        file, line = pool.place(finding.partner)
        answers.append(f'<div class="answer"><p class="verdict">kept: {escape(file)}:{line}</p>'
                       f'<p class="text">{escape(pool.text(finding.partner)[:_SHOWN_CHARS])}</p></div>')
    elif finding.partner is not None:
        answers.append(f'<div class="answer"><p class="verdict">stands against it</p><p class="text">'
                       f'{escape(str(finding.partner))}</p></div>')
    elif finding.details:
        answers.append(f'<div class="answer"><p class="verdict">annotated</p><p class="text">'
                       f'{escape(json.dumps(finding.details, ensure_ascii=False))}</p></div>')
    return f'<article><div class="pair">{"".join(answers)}</div></article>'


def _excerpt(text, finding):
    """The text, or the part of it around the span that a benchmark's item shares, which is marked."""
    hits = (finding.details or {}).get("hits")
    if not hits:
        return escape(text[:_SHOWN_CHARS]) + ("…" if len(text) > _SHOWN_CHARS else "")
    begin, end = hits[0][2:]
    first = max(0, begin - 200)
    return (f'{"…" if first else ""}{escape(text[first:begin])}<mark>{escape(text[begin:end][:_SHOWN_CHARS])}</mark>'
            f'{escape(text[end : end + 200])}')


_OWN_STYLE = """
.flow td{min-width:60px}.flow .bar{min-width:260px}.flow ul{margin:0;padding:0;list-style:none}
.bar div{display:flex;height:16px;background:var(--card);border-radius:3px;overflow:hidden}
.bar .left{background:var(--c0)}.bar .lost{background:var(--c);opacity:.75}
.before{fill:var(--rule)}.after{fill:var(--c0)}mark{background:var(--mark);color:var(--ink)}
"""
