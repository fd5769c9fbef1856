"""The part of a report that only GRPO runs have: the pass rates of the prompts, and transcripts of the rollouts."""

import json
from html import escape
from pathlib import Path

_WIDTH, _HEIGHT, _BASE = 340, 150, 118  # SVG units; _BASE: where the bars stand
_NUM_SHOWN = 4
_NUM_SEARCHED = 64  # completions of a rollout in which a group with different rewards is looked for


def read_pass_rates(folder):
    """pass_rates.json of a run folder: {"samples", "problems": [how many with 0, 1, ... right], "kept"}, or None."""
    path = Path(folder, "pass_rates.json")
    if not path.is_file():
        return None
    rates = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(rates.get("problems"), list) or len(rates["problems"]) != rates.get("samples", 0) + 1:
        raise ValueError(f"{path}: expected samples, and problems with one count more.")
    return rates


def read_transcripts(folder):
    """{rollout: the answers to one of its prompts, as rows of round-0.jsonl}; a prompt with different rewards where
    there is one among the first."""
    transcripts = {}
    for path in sorted(Path(folder, "rollouts").glob("[0-9]*/round-0.jsonl")):
        groups = {}
        with open(path, encoding="utf-8") as file:
            for _, line in zip(range(_NUM_SEARCHED), file, strict=False):
                row = json.loads(line)
                groups.setdefault(row["prompt_index"], []).append(row)
        mixed = [group for group in groups.values() if len({row["reward"] for row in group}) > 1]
        if groups:
            transcripts[int(path.parent.name)] = (mixed or list(groups.values()))[0]
    return transcripts


def draw_grpo(name, pass_rates, transcripts):
    """HTML of a run's pass rates and transcripts."""
    parts = [f"<h3>{escape(name)}</h3>"]
    if pass_rates:
        parts.append(_draw_histogram(pass_rates))
    drawn = []
    for place, number in enumerate(sorted(transcripts, reverse=True)):
        group = transcripts[number]
        rewards = " ".join(f"{row['reward']:g}" for row in group)
        drawn.append(f'<details{" open" if place == 0 else ""}><summary>rollout {number + 1:,}: rewards {rewards}'
                     f"</summary>{_draw_group(group)}</details>")
    parts += drawn[:_NUM_SHOWN]
    if earlier := drawn[_NUM_SHOWN:]:
        parts.append(f"<details><summary>{len(earlier):,} earlier rollouts</summary>{''.join(earlier)}</details>")
    return "".join(parts)


def _draw_histogram(rates):
    counts, total = rates["problems"], max(1, sum(rates["problems"]))
    step = (_WIDTH - 20) / len(counts)
    highest = max(max(counts), 1)
    bars = []
    for right, count in enumerate(counts):
        height = 96 * count / highest
        x = 10 + right * step
        css_class = "kept" if 0 < right < len(counts) - 1 else "left-out"
        bars.append(f'<rect class="{css_class}" x="{x + 2:.1f}" y="{_BASE - height:.1f}" width="{step - 4:.1f}" '
                    f'height="{height:.1f}"><title>{right} of {len(counts) - 1} right: {count} problems</title></rect>'
                    f'<text class="tick" x="{x + step / 2:.1f}" y="{_BASE - height - 3:.1f}" text-anchor="middle">'
                    f'{count}</text>'
                    f'<text class="tick" x="{x + step / 2:.1f}" y="{_BASE + 12}" text-anchor="middle">{right}</text>')
    note = f"{rates['kept']:,} of {total:,} problems kept: those that the starting model solves sometimes"
    return (f'<figure class="rates"><figcaption><b>Pass rates before training</b> <span>problems by right answers of '
            f'{len(counts) - 1}</span></figcaption><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
            f'aria-label="Pass rates before training">{"".join(bars)}<text class="tick" x="{_WIDTH / 2}" '
            f'y="{_HEIGHT - 4}" text-anchor="middle">right answers</text></svg><small>{note}</small></figure>')


def _draw_group(group):
    first = group[0]
    expected = f'<p class="expected">expected <b>{escape(str(first["value"]))}</b></p>' if first.get("value") else ""
    rows = "".join(
        f'<tr{"" if row["live"] else " class=masked"}><td>{row["reward"]:g}</td><td>{row["advantage"]:+.2f}</td>'
        f'<td>{escape(row["reason"])}</td><td>{row["num_tokens"]}{" cut" if row["truncated"] else ""}</td>'
        f'<td class="text">{_thoughts(row)}{escape(row["answer"])}</td></tr>' for row in group)
    return (f'<article><p class="prompt">{escape(first["prompt"])}</p>{expected}<div class="wide"><table><thead><tr>'
            '<th>reward</th><th>advantage</th><th>why</th><th>tokens</th><th>answer</th></tr></thead>'
            f'<tbody>{rows}</tbody></table></div></article>')


def _thoughts(row):
    return f"<i>{escape(row['thoughts'])}</i>\n" if row.get("thoughts") else ""


STYLE = """
.rates{max-width:420px;margin:0 0 12px}.rates .kept{fill:var(--c0)}.rates .left-out{fill:var(--rule)}
h3{font-size:14px;margin:18px 0 8px}.masked{opacity:.5}article td{min-width:0}article td.text{min-width:260px}
"""
