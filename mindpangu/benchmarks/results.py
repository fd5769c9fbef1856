"""Measured scores in the papers' layout, beside the columns that they print: as text and as HTML."""

import csv
from html import escape
from importlib.resources import files

from .files import SOURCES, missing_patterns
from .tasks import forms

_NO_VALUE = "–"


def read_published(form):
    """({system: table}, {benchmark: {"group", "metric", "scores": {system: (score, from its own paper)}}}).

    Out of published.csv: P1 (the openPangu Embedded-1B report) tables 3 and 4, P2 ("Post-training via KD") table 1.
    """
    systems, rows = {}, {}
    with (files(__package__) / "published.csv").open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            if line["form"] != form:
                continue
            systems[line["system"]] = line["table"]
            row = rows.setdefault(line["benchmark"], {"group": line["group"], "metric": line["metric"], "scores": {}})
            row["scores"][line["system"]] = (float(line["score"]), line["from_original_paper"] == "yes")
    # The model at hand first, then the others.
    own = [system for system in ("openPangu-1B", "V1", "V1.1", "SFT", "KD") if system in systems]
    return {system: systems[system] for system in [*own, *(s for s in systems if s not in own)]}, rows


def layout(results):
    """(head, rows) of the table, as text: the papers' rows in their order, others below, averages last.

    results: {"form", "benchmarks": {name: what summarize returns}}. An average is that of the rows which are measured
    and published, of every column the same ones, so that it compares.
    """
    systems, published = read_published(results["form"])
    about = "P1's shots" if results["form"] == "base" else "metric"
    head = ["", "benchmark", about, "this model", "± stderr", "k / N", *systems]
    known, measured, rows, compared = forms()[results["form"]], results["benchmarks"], [], []
    places = {row: place for place, row in enumerate(published)}
    order = sorted(measured, key=lambda name: places.get(known[name].published, len(places)))
    for name in order:
        found, row = measured[name], published.get(known[name].published)
        scores = row["scores"] if row else {}
        rows.append([row["group"] if row else "", SOURCES[known[name].source].title, row["metric"] if row else "",
                     f"{found['score']:.2f}", f"{found['stderr']:.2f}", f"{found['k']:g} / {found['N']}",
                     *(_shown(scores.get(system)) for system in systems)])
        if row:
            compared.append((found["score"], scores))
    if compared:
        means = [sum(scores[system][0] for _, scores in compared) / len(compared) for system in systems]
        own = sum(score for score, _ in compared) / len(compared)
        rows.append(["", f"average of {len(compared)}", "", f"{own:.2f}", "", "", *(f"{mean:.2f}" for mean in means)])
    return head, rows


def _shown(entry):
    return _NO_VALUE if entry is None else f"{entry[0]:.2f}{'*' if entry[1] else ''}"


def _notes(results):
    """What a reader of the numbers has to know."""
    systems, _ = read_published(results["form"])
    by_table = {}
    for system, table in systems.items():
        by_table.setdefault(table, []).append(system)
    model, decoding = results["model"], results["decoding"]
    how = (f"temperature {decoding['temperature']:g}, top-p {decoding['top_p']:g}, mean of {decoding['num_repeats']}"
           if decoding["temperature"] else "greedy")
    length = f"up to {decoding['max_new_tokens']} tokens" if decoding["max_new_tokens"] else "as long as each task says"
    notes = [f"This model: {model['folder']}, {model['device']}, {model['precision']}; decoding: {how}, {length}.",
             "Published: " + "; ".join(f"{', '.join(names)}: {table}" for table, names in by_table.items()) +
             ". * from the system's own paper."]
    for name, found in results["benchmarks"].items():
        source = SOURCES[forms()[results["form"]][name].source]
        if source.num_items and found["items"] != source.num_items:
            notes.append(f"{source.title}: {found['items']} of {source.num_items} items.")
        if not source.run:
            notes.append(f"{source.title}: unrun on real data when this code was tested, only on items of its form.")
    if cut := sum(kind["cut_prompts"] for kind in results["measured"].values()):
        notes.append(f"{cut} prompts were longer than the model's positions allow: their starts were cut.")
    return notes


def as_text(results):
    """The table for a terminal."""
    head, rows = layout(results)
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) if i < 3 else cell.rjust(width)
                       for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
             for row in (head, *rows)]
    return "\n".join([*lines, *_notes(results)])


def as_html(results):
    """The table as a section of report.html; its class "wide" lets it scroll."""
    head, rows = layout(results)
    body = "".join("<tr>" + "".join(f"<{'th' if i < 3 else 'td'}>{escape(cell)}</{'th' if i < 3 else 'td'}>"
                                    for i, cell in enumerate(row)) + "</tr>" for row in rows)
    return ('<h2>Benchmarks</h2><div class="wide"><table><thead><tr>' +
            "".join(f"<th>{escape(cell)}</th>" for cell in head) + f"</tr></thead><tbody>{body}</tbody></table></div>" +
            "".join(f"<p>{escape(note)}</p>" for note in _notes(results)))


def describe_tasks(folder):
    """What can be evaluated, from which files, whence and under which licence: text for a terminal."""
    lines = [f"Benchmarks, read from {folder} (eval.benchmarks_dir); nothing is ever fetched.", ""]
    for name, source in SOURCES.items():
        used = [form for form, benchmarks in forms().items() if any(b.source == name for b in benchmarks.values())]
        missing = missing_patterns(source, folder)
        files_there = "" if not missing else "   MISSING" if len(missing) == len(source.patterns) else (
            f"   MISSING: {', '.join(missing)}")
        lines += [f"{name}  ({source.title}; {', '.join(used)})",
                  f"  files    {', '.join(source.patterns)}{files_there}",
                  f"  from     {source.url}", f"  licence  {source.licence}",
                  f"  tested   {'on these files' if source.run else 'unrun on real data, on items of this form only'}",
                  ""]
    return "\n".join(lines)
