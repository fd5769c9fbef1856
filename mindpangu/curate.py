"""Curate raw sources to packed training data: python -m mindpangu.curate recipe=curate 'curate.sources=[...]'

    read -> exact_duplicates -> attributes -> benchmarks -> near_duplicates -> zip -> tokenize -> mix -> rows

The stages are functions from Documents to Findings: what is to be dropped, and why. run.root/documents-<key> holds what
was read and what each stage found, under a key of all that it depends on: a changed setting repeats only what comes
after it, and a killed run goes on. The run folder gets

    curated.jsonl   the documents that are left, as conversations, which data=chats reads, or as plain documents
    dropped/*.jsonl the others: stage, reason, score, partner, where they came from, and the record
    rows/           the mixture, tokenized and packed: data.source=packed data.train=[<folder>/rows]
    report.html, summary.json

Imports no MindSpore.
"""

import functools
import itertools
import json
import os
import pickle
import shutil
import time
from array import array
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash
from omegaconf import OmegaConf

from .benchmarks.items import list_items
from .config import as_dict
from .data.arithmetic import make_problems
from .data.arithmetic import to_example as problem_to_example
from .data.attributes import (
    PASS_RATES,
    add_complexity,
    annotate_by_rules,
    difficulty,
    from_json,
    judge_attributes,
    pass_rates,
    quality,
    to_json,
)
from .data.chat import Tokenized, encode_chat, template_digest
from .data.corpus import digest_files
from .data.decontaminate import Item, find_items, index_items
from .data.dedup import near_duplicates
from .data.documents import to_chat, to_example
from .data.engine import Local, cut
from .data.mixture import mix_samples
from .data.packed_shards import bound_samples, write_packed
from .data.parallel import collect_rarely
from .data.pool import Pool, TextBytes, escape_halves, json_line, write_pool
from .data.shards import open_aside, read_shard, write_aside, write_shard
from .data.sources import Source, list_files, read_sources
from .data.tokenizer import Tokenizer
from .data.zip_selection import State, select
from .pipeline import built_tokenizer, entry_point, make_key, require_alone
from .runtime.checkpoint import lock_folder, write_atomic
from .runtime.device import num_usable_cores
from .runtime.metrics import Reporter, format_seconds, peak_memory_gib, say

_LINKED_CHARS = 1 << 21  # of documents that bands link, compared with each other at a time; a larger group is one
_NO_PART_IN_LABELS = ("api_key_env", "timeout_s", "max_retries", "num_parallel", "prompt_price", "completion_price",
                      "pass_rates")
_CHUNK, _CHUNK_CHARS = 2048, 1 << 23  # lines that a process handles at a time, and characters of their documents
_LEAST_FILL = 0.95  # of rows
_LAYOUT = 2  # of the files in a folder of documents
_SAVE_EVERY_S = 30.0  # of what a selection has so far


class Documents(NamedTuple):
    """Some documents of a pool. numbers: int64, rising."""

    pool: Pool
    numbers: np.ndarray


class Finding(NamedTuple):
    """What a stage found about a document. score: what it went by. partner: the document, by its number, or the
    benchmark's item that stands against it. drop: False where it is only reported. details: JSON."""

    document: int
    reason: str
    score: float | None = None
    partner: int | str | None = None
    drop: bool = True
    details: dict | None = None


# ---- The stages, in their order --------------------------------------------------------------------------------------

def exact_duplicates(documents):
    """Documents whose normalised text an earlier one has."""
    pool, numbers = documents
    keys_N2 = pool.keys_N2[numbers]
    order = np.lexsort((numbers, keys_N2[:, 1], keys_N2[:, 0]))
    ordered = keys_N2[order]
    begins = np.append(True, (ordered[1:] != ordered[:-1]).any(1))
    firsts = order[begins][np.cumsum(begins)[~begins] - 1]
    repeated = order[~begins]
    for i in np.argsort(repeated):
        yield Finding(int(numbers[repeated[i]]), "exact_duplicate", 1.0, int(numbers[firsts[i]]))


def unwanted_attributes(documents, config, engine, labels, cache, reporter):
    """Documents that the FilterConfig of a CurateConfig drops, by their Attributes in the file labels.

    Where it is missing, it is written: a line {"document", ...} each, by rules and, where config.annotate asks for one,
    a model whose replies are kept in the folder cache; and beside it, .bin, their quality and difficulty, float64.
    """
    if labels.exists():
        with open(labels, "rb") as file:
            for findings in engine.map_batches(functools.partial(_judge_lines, config.filter), _chunks(file)):
                yield from findings
        return
    pieces, count = cut(documents), 0
    with open_aside(labels) as file, open_aside(labels.with_suffix(".bin")) as values:  # which is in place first
        annotations = _annotations(documents.pool, pieces, config, engine, cache, reporter)
        for numbers, (lines, values_D2, findings) in zip(pieces, annotations, strict=True):
            file.write(lines)
            values.write(values_D2.tobytes())
            yield from findings
            count += numbers.size
            if config.annotate.engine == "rules":
                reporter.advance(count)


def _annotations(pool, pieces, config, engine, cache, reporter):
    """For each piece what `_annotated` gives."""
    if config.annotate.engine == "rules":
        work = functools.partial(_annotate_by_rules, config.annotate.pass_rates, config.filter)
        yield from engine.map(work, pool, pieces)
        return
    from .data.annotators import Progress, annotate_by_model, describe, open_endpoint  # which imports an HTTP client

    before = Progress(0, 0, 0, 0, 0, 0.0)  # of the pieces that are done
    with open_endpoint(config.annotate, cache) as endpoint:
        for numbers in pieces:
            so_far = [before]

            def show(progress, so_far=so_far):
                so_far.append(Progress(*map(sum, zip(so_far[0], progress, strict=True))))
                left = reporter.eta_s()
                eta = f", {format_seconds(left)} left" if left is not None else ""
                total = so_far[-1]._replace(num_documents=reporter.total)
                reporter.advance(total.num_done, describe(total) + eta)

            documents = pool.documents(numbers)
            annotated = annotate_by_model(documents, config.annotate, on_progress=show, endpoint=endpoint)
            before = so_far[-1]
            if config.annotate.pass_rates:
                annotated = add_complexity(documents, annotated, _rates(config.annotate.pass_rates))
            yield _annotated(numbers, annotated, config.filter)
    say(describe(before))


def _parse_attributes(line):
    fields = json.loads(line)
    return fields.pop("document"), from_json(fields)


def read_lines_about(labels, pieces):
    """Yields, for each of pieces of rising numbers, the lines about its documents in a file of their Attributes."""
    with open(labels, "rb") as file:
        for numbers in pieces:
            openings = [b'{"document": %d,' % number for number in numbers]
            yield [next(line for line in file if line.startswith(opening)) for opening in openings]  # each read once


def write_index(path, items):
    """Writes the index of a list of Item, for `benchmarks`; returns its path."""
    write_aside(path, pickle.dumps(index_items(items)))
    return path


def benchmarks(documents, index, action, engine, on_done):
    """Documents that hold an item of a benchmark: 13 of its words in a row, or all of a shorter one. index: the path
    of its items'."""
    pieces, count = cut(documents), 0
    for piece, hits in zip(pieces, engine.map(functools.partial(_hits, str(index)), documents.pool, pieces),
                           strict=True):
        of_document = {}
        for hit in hits:
            of_document.setdefault(int(piece[hit.document]), []).append(hit)
        for number, found in of_document.items():
            longest = max(found, key=lambda hit: hit.end - hit.start)
            share = (longest.end - longest.start) / max(1, int(documents.pool.char_counts_N[number]))
            yield Finding(number, "benchmark_item", share, f"{longest.benchmark} {longest.item}", action == "drop",
                          {"hits": [[hit.benchmark, hit.item, hit.start, hit.end] for hit in found]})
        count += piece.size
        on_done(count)


def near_duplicates_of(documents, quality_N, settings, engine, scratch, on_done):
    """All but the best document of each component of near-duplicates."""
    links = engine.link(documents, settings, scratch, on_done)
    # Documents that no band links are in different components: those that are linked fit in memory, some at a time.
    order = np.argsort(links, kind="stable")
    _, firsts, counts = np.unique(links[order], return_index=True, return_counts=True)
    pieces, waiting, chars = [], [], 0
    for first, count in zip(firsts[counts > 1].tolist(), counts[counts > 1].tolist(), strict=True):
        members = order[first : first + count]
        waiting.append(members)
        chars += int(documents.pool.char_counts_N[documents.numbers[members]].sum())
        if chars > _LINKED_CHARS:
            pieces.append(np.sort(np.concatenate(waiting)))
            waiting, chars = [], 0
    if waiting:
        pieces.append(np.sort(np.concatenate(waiting)))
    pieces = [(documents.numbers[places], quality_N[places]) for places in pieces]
    found = engine.map(functools.partial(_near_duplicates, settings), documents.pool, pieces)
    for (numbers, _), (partners, scores) in zip(pieces, found, strict=True):
        for place in np.flatnonzero(partners != np.arange(partners.size)).tolist():
            yield Finding(int(numbers[place]), "near_duplicate", float(scores[place]), int(numbers[partners[place]]))


def zip_selection(documents, strata_N, settings, num_processes, scratch, on_done, workers=None):
    """Documents that are not among the settings' budget of those that repeat least."""
    pool, numbers = documents
    if not 0 < settings.budget < numbers.size:
        return
    path, state, saved = scratch.with_suffix(".shard"), None, time.monotonic()
    if path.exists():
        state = State(**read_shard(path))

    def save(new_state):
        nonlocal state, saved
        state = new_state
        on_done(min(settings.budget, state.selected.size))
        if time.monotonic() - saved > _SAVE_EVERY_S:
            write_shard(path, state._asdict())
            saved = time.monotonic()

    texts = TextBytes(pool, numbers)
    if settings.compat == "repr":
        texts = [pool.record(number) for number in numbers]
    selected = select(texts, settings.budget, settings.engine, settings.k1, settings.k2, settings.k3, strata_N,
                      settings.compat, num_processes, state, save, workers)
    for place in np.setdiff1d(np.arange(numbers.size), selected):
        score = float(state.scores_N[place])
        yield Finding(int(numbers[place]), "not_selected", score if np.isfinite(score) else None)


def too_long_or_without_reply(documents, lengths_D, seq_len, is_text):
    """Documents that are no sample to learn from: no reply, or, of conversations, more tokens than a row has."""
    for place in np.flatnonzero((lengths_D == 0) | ((lengths_D > seq_len) & (not is_text))):
        number, length = int(documents.numbers[place]), float(lengths_D[place])
        yield Finding(number, "too_many_tokens", length) if length else Finding(number, "no_reply")


def held_out(documents, count):
    """Documents to validate on, at most a tenth, and one where there are two: those with the lowest hashes, whatever
    their order."""
    pool, numbers = documents
    order = np.lexsort((pool.keys_N2[numbers, 1], pool.keys_N2[numbers, 0]))
    for place in np.sort(order[: min(count, max(numbers.size // 10, numbers.size > 1))]).tolist():
        yield Finding(int(numbers[place]), "held_out")


# ---- What the processes do -------------------------------------------------------------------------------------------

def _annotate_by_rules(run_folder, filter_config, pool, numbers):
    documents = pool.documents(numbers)
    annotated = annotate_by_rules(documents)
    if run_folder:
        annotated = add_complexity(documents, annotated, _rates(run_folder))
    return _annotated(numbers, annotated, filter_config)


def _annotated(numbers, annotated, filter_config):
    """(lines of JSON, quality and difficulty float64 [D, 2], Findings) of the Attributes of documents."""
    pairs = list(zip(numbers.tolist(), annotated, strict=True))
    lines = b"".join(json_line({"document": number} | to_json(attributes)) for number, attributes in pairs)
    values = np.array([(quality(attributes), difficulty(attributes)) for attributes in annotated])
    return lines, values, _judge(filter_config, pairs)


def _judge_lines(filter_config, lines):
    return _judge(filter_config, map(_parse_attributes, lines))


def _judge(filter_config, pairs):
    """Findings about (number, Attributes)."""
    return [Finding(number, *found, details={"attributes": to_json(attributes)}) for number, attributes in pairs
            if (found := judge_attributes(attributes, filter_config))]


_rates = functools.lru_cache(maxsize=1)(pass_rates)


@functools.lru_cache(maxsize=1)
def _index(path):
    return pickle.loads(Path(path).read_bytes())


def _hits(index, pool, numbers):
    return find_items(pool.texts(numbers), _index(index))


def _near_duplicates(settings, pool, piece):
    numbers, quality = piece
    return near_duplicates(pool.texts(numbers), quality, settings.threshold,
                           settings.num_permutations, settings.band_size, settings.num_words)


_tokenizer = functools.lru_cache(maxsize=1)(Tokenizer)


def _tokenize(tokenizer_file, dress, folder, pool, piece):
    """Writes the tokens of a piece of documents, unless they are there; returns their numbers, 0 without a reply."""
    index, numbers = piece
    path = Path(folder, f"{index:06d}.lengths.npy")
    if path.exists():
        return np.load(path)
    tokenizer, tokens, is_target = _tokenizer(tokenizer_file), [], []
    for number in numbers:
        if dress == "text":
            ids = [tokenizer.bos_id, *tokenizer.encode(pool.text(number)), tokenizer.turn_end_id]
            sample = np.array(ids, np.int32), np.arange(len(ids)) > 0
        else:
            try:
                example = to_example(pool.record(number), dress, pool.sources[pool.sources_N[number]]["fields"])
                sample = encode_chat(tokenizer, example.messages)
            except ValueError:
                sample = np.zeros(0, np.int32), np.zeros(0, bool)
        tokens.append(sample[0])
        is_target.append(sample[1])
    lengths = np.array([one.size for one in tokens], np.int64)
    for name, values in (("tokens", tokens), ("targets", is_target)):
        write_aside(Path(folder, f"{index:06d}.{name}"), np.concatenate(values).tobytes())
    with open_aside(path) as file:  # last: where it is, the others are
        np.save(file, lengths)
    return lengths


_SAMPLE = np.dtype([("piece", np.int32), ("length", np.int32), ("begin", np.int64)])


def write_order(path, lengths_D, places_M, piece_starts):
    """Writes the order of a mixture, for MixedTokens: of each sample, the piece of documents that it was tokenized
    with, and its tokens there. places_M: of each sample, its document's place among those that were tokenized."""
    begins_D = np.cumsum(lengths_D) - lengths_D
    with open_aside(path) as file:
        for first in range(0, places_M.size, _CHUNK):
            places = places_M[first : first + _CHUNK]
            samples = np.empty(places.size, _SAMPLE)
            samples["piece"] = np.searchsorted(piece_starts, places, "right") - 1
            samples["length"] = lengths_D[places]
            samples["begin"] = begins_D[places] - begins_D[piece_starts[samples["piece"]]]
            file.write(samples.tobytes())


class MixedTokens(NamedTuple):
    """Tokenized samples in a mixture's order: (first, end) -> list of Tokenized. order: a file of `write_order`.
    folder: the files of `_tokenize`."""

    order: str
    folder: str

    def __call__(self, first, end):
        samples = np.fromfile(self.order, _SAMPLE, end - first, offset=first * _SAMPLE.itemsize)
        return [self._sample(*sample) for sample in samples.tolist()]

    def _sample(self, piece, length, begin):
        tokens, targets = _opened(self.folder, piece)
        return Tokenized(np.frombuffer(os.pread(tokens.fileno(), 4 * length, 4 * begin), np.int32),
                         np.frombuffer(os.pread(targets.fileno(), length, begin), bool))


@functools.lru_cache(maxsize=256)
def _opened(folder, index):
    # Not mapped: pages that were looked at would count as this process's memory.
    return [open(Path(folder, f"{index:06d}.{name}"), "rb", buffering=0) for name in ("tokens", "targets")]  # noqa: SIM115


# ---- The run ---------------------------------------------------------------------------------------------------------

class Flow:
    """What the stages found, in files of the work folder; each has a key of all that it depends on.

    stages: of each stage, its name, the numbers of documents in and out, what was dropped and reported by reason, and
    the seconds that it took when it ran.
    """

    def __init__(self, work, key):
        self.work, self.key, self.stages = work, key, []

    def scratch(self, name, settings):
        """A path for what this stage leaves behind, under its key; also that of all that follow."""
        self.key = make_key(name, settings, self.key)
        return self.work / f"{name}-{self.key}"

    def run(self, name, documents, settings, find):
        """The Documents that are left after those of find(documents, scratch, reporter), an iterator of Findings."""
        scratch = self.scratch(name, settings)
        path = self.work / f"{scratch.name}.jsonl"
        if not path.with_suffix(".json").exists():
            began = time.monotonic()
            with Reporter(name, len(documents.numbers)) as reporter, open_aside(path) as file:
                tally = _Tally(self._written(find(documents, scratch, reporter), file))
            write_atomic(path.with_suffix(".json"), json.dumps({"seconds": round(time.monotonic() - began, 3)}))
            remove(scratch)
        else:
            tally = _Tally(read_findings(path))
        seconds = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["seconds"]
        dropped, reasons = tally.dropped, tally.reasons
        left = np.setdiff1d(documents.numbers, np.array(dropped, np.int64), assume_unique=True)
        assert left.size + len(dropped) == documents.numbers.size, f"{name}: a document was dropped twice"
        self.stages.append({"name": name, "in": documents.numbers.size, "out": left.size, "dropped": reasons[True],
                            "reported": reasons[False], "seconds": seconds, "file": path.name})
        why = ", ".join(f"{count:,} {reason}" for reason, count in reasons[True].most_common())
        told = "".join(f"; reported {count:,} {reason}" for reason, count in reasons[False].most_common())
        say(f"{name:16} {documents.numbers.size:>10,} -> {left.size:>10,}  {seconds:8.1f}s  {why}{told}")
        if not left.size:
            raise ValueError(f"{name} leaves no document ({why}): loosen its settings, or leave it out of "
                             f"curate.stages; what it found is in {path}.")
        return Documents(documents.pool, left)

    @staticmethod
    def _written(findings, file):
        for finding in findings:
            file.write(json_line(finding))
            yield finding


class _Tally:
    """dropped: documents. reasons: {whether dropped: Counter}."""

    def __init__(self, findings):
        self.dropped, self.reasons = array("q"), {True: Counter(), False: Counter()}
        for finding in findings:
            self.reasons[finding.drop][finding.reason] += 1
            if finding.drop:
                self.dropped.append(finding.document)


def read_findings(path):
    """Yields the Findings that a stage has written."""
    with open(path, "rb") as file:
        yield from map(_parse_finding, file)


def _parse_finding(line):
    return Finding(*json.loads(line))


def remove(scratch):
    """What a stage needed on its way: a folder, or a file with an ending."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.with_suffix(".shard").unlink(missing_ok=True)


def run(recipe, overrides):
    """The command."""
    require_alone("python -m mindpangu.curate")
    if recipe.task in ("evaluate", "export"):
        raise ValueError(f"recipe={recipe.recipe} takes no data: expected curate, or the recipe of a training stage.")
    collect_rarely()
    curate(recipe, recipe.run.dir)


def curate(recipe, run_dir=None, may_build=True):
    """Curates the sources of a recipe into packed rows; returns the run folder. ValueError where it is not there and
    may not be built."""
    with make_engine(recipe.curate.engine, _num_processes(recipe)) as engine:
        return _curate(recipe, run_dir, may_build, engine)


def _curate(recipe, run_dir, may_build, engine):
    from .tools.report_curate import draw_curation

    config, root = recipe.curate, Path(recipe.run.root)
    tokenizer = built_tokenizer(recipe)
    sources, items, items_digest = _inputs(recipe, root)
    files = digest_files([path for source in sources for path in list_files(source)])
    pool_key = make_key("documents", [_LAYOUT, config.on_error, [source._asdict() for source in sources]], files)
    chosen = as_dict(config)
    for name in ("sources", "engine", "num_processes"):
        del chosen[name]
    data = [getattr(recipe.data, name) for name in ("dress", "seq_len", "num_heldout")]
    key = make_key("curate", [chosen, as_dict(recipe.mix), data, recipe.seed, _tokens_of_the_run(recipe)],
                   [pool_key, items_digest, tokenizer.digest, template_digest(), _annotators_digests(config.annotate)])
    folder = Path(run_dir or root / f"{recipe.recipe}-{recipe.scale}-curated-{key}")
    if _is_done(folder, key):
        say(f"{recipe.recipe}: already curated in {folder}")
        return folder
    if not may_build:
        raise ValueError(f"{folder}: not curated yet, which at this scale is a job of its own: run python -m "
                         "mindpangu.curate with the same arguments first.")
    work = root / f"documents-{pool_key}"
    with lock_folder(folder), lock_folder(work):
        write_atomic(folder / "curation.json", json.dumps({"key": key}))
        write_atomic(folder / "recipe.yaml", OmegaConf.to_yaml(OmegaConf.create(as_dict(recipe))))
        began = time.monotonic()
        index = None
        if "benchmarks" in config.stages and items:
            index = engine.ahead(write_index, work / f"benchmarks-{items_digest}.index", items)
        pool = _read(work, sources, config, engine)
        flow = Flow(work, pool_key)
        documents, difficulty_N, labels = _run_stages(flow, Documents(pool, np.arange(len(pool))), recipe, index,
                                                      items_digest, engine)
        documents, rows = _write_rows(flow, documents, recipe, tokenizer, folder / "rows", engine, difficulty_N)
        _write_documents(folder / "curated.jsonl", documents, recipe.data.dress, engine, labels)
        _write_dropped(folder, flow, pool, engine)
        summary = {"seconds": round(time.monotonic() - began, 1), "peak_memory_gib": round(peak_memory_gib(), 3),
                   "documents": len(pool), "malformed": pool.num_malformed, "stages": flow.stages, **rows}
        write_atomic(folder / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False))
        write_atomic(folder / "report.html", draw_curation(
            folder.name, summary, pool, documents.numbers, lambda stage: read_findings(work / stage["file"])))
        write_atomic(folder / "done.json", json.dumps({"key": key}))
    say(f"{recipe.recipe}: {len(pool):,} documents -> {documents.numbers.size:,} in "
        f"{format_seconds(summary['seconds'])}; {folder}")
    return folder


def _tokens_of_the_run(recipe):
    """How long a mixture with a curriculum is to be for it to end with the training; 0: what it takes to see all."""
    if recipe.curate.size or not recipe.mix.curriculum or recipe.task != "language_model":
        return 0
    return recipe.train.steps * recipe.train.rows_per_step * recipe.data.seq_len * _LEAST_FILL


def _is_done(folder, key):
    """Whether a folder holds this curation, complete. Raises ValueError if it holds another one."""
    if folder.exists() and {path.name for path in folder.iterdir()} - {".lock"} and not (
            folder / "curation.json").exists():
        raise ValueError(f"{folder} holds something else than a curation: choose another run.dir, or leave it out.")
    if (folder / "curation.json").exists():
        found = json.loads((folder / "curation.json").read_text(encoding="utf-8"))["key"]
        if found != key:
            raise ValueError(f"{folder} holds another curation: its sources or settings, in its recipe.yaml, differ; "
                             "choose another run.dir, or leave run.dir out.")
    return (folder / "done.json").exists()


def _run_stages(flow, documents, recipe, index, items_digest, engine):
    """The Documents that are left; for every document of the pool its difficulty, not a number where unknown; and the
    file of the Attributes, None without. index: gives the path of the benchmarks' items; None: there are none."""
    config = recipe.curate
    num_processes = _num_processes(recipe)
    quality_N, difficulty_N = np.zeros(len(documents.pool)), np.full(len(documents.pool), np.nan)
    if "exact_duplicates" in config.stages:
        documents = flow.run("exact_duplicates", documents, None,
                             lambda documents, scratch, reporter: exact_duplicates(documents))
    labels = None
    if "attributes" in config.stages:
        chosen = {name: value for name, value in as_dict(config.annotate).items() if name not in _NO_PART_IN_LABELS}
        labels = flow.scratch("labels", [chosen, _annotators_digests(config.annotate)]).with_suffix(".jsonl")
        annotated = documents.numbers
        documents = flow.run("attributes", documents, as_dict(config.filter), lambda documents, scratch, reporter:
                             unwanted_attributes(documents, config, engine, labels, flow.work.parent / "annotations",
                                                 reporter))
        quality_N[annotated], difficulty_N[annotated] = np.memmap(labels.with_suffix(".bin"), np.float64,
                                                                  "r").reshape(-1, 2).T
    if index:
        path = index()
        documents = flow.run("benchmarks", documents, [config.decontaminate.action, items_digest],
                             lambda documents, scratch, reporter: benchmarks(
                                 documents, path, config.decontaminate.action, engine, reporter.advance))
        path.unlink()
    if "near_duplicates" in config.stages:
        settings = config.near_duplicates
        documents = flow.run("near_duplicates", documents, as_dict(settings),
                             lambda documents, scratch, reporter: near_duplicates_of(
                                 documents, quality_N[documents.numbers], settings, engine, scratch,
                                 reporter.advance))
    if "zip" in config.stages:
        documents = flow.run("zip", documents, as_dict(config.zip),
                             lambda documents, scratch, reporter: zip_selection(
                                 documents, _strata(documents) if config.zip.strata else None, config.zip,
                                 num_processes, scratch, reporter.advance, engine.workers))
    return documents, difficulty_N, labels


def _annotators_digests(config):
    """Of what an AnnotateConfig names: a student's pass rates, a model's weights."""
    digests = digest_files([Path(config.pass_rates, PASS_RATES)] if config.pass_rates else [])
    if config.engine == "checkpoint":
        from .data.annotators import checkpoint_digest  # which imports an HTTP client

        digests["checkpoint"] = checkpoint_digest(config.checkpoint)
    return digests


def _num_processes(recipe):
    return recipe.curate.num_processes or recipe.run.num_threads or num_usable_cores()


def make_engine(name, num_processes):
    if name == "ray":
        from .data.ray_engine import RayEngine

        return RayEngine(num_processes)
    return Local(num_processes)


def _inputs(recipe, root):
    """([Source], [Item], digest of the items) of a recipe."""
    config, check = recipe.curate, recipe.curate.decontaminate
    sources = [Source(source.name, tuple(source.paths), source.language, source.category or source.name,
                      source.licence, tuple(source.fields)) for source in config.sources]
    items, counts = list_items(check.benchmarks_dir) if check.benchmarks_dir else ([], {})
    files = list(check.files)
    if config.built_in or not sources:
        if recipe.scale == "1b":
            raise ValueError("curate.built_in is for the small scales: name the files to curate, for example "
                             "'curate.sources=[{name: mine, paths: [my_chats.jsonl]}]'.")
        sources.append(Source("arithmetic", (str(_built_in_problems(recipe.data, root)),), category="STEM"))
    for path in files:
        name = Path(path).name.split(".")[0]
        found = [Item(name, f"{document.line}", _question(document.record) or document.text)
                 for document in read_sources([Source(name, path)])]
        items += found
        counts[name] = counts.get(name, 0) + len(found)
    if "benchmarks" in config.stages:
        say("benchmarks: " + (", ".join(f"{name} {count:,}" for name, count in counts.items()) or
                              "none, so nothing is decontaminated: give curate.decontaminate.benchmarks_dir"))
    return sources, items, xxhash.xxh3_128_hexdigest(json.dumps(items).encode())


def _built_in_problems(data, root):
    """A file with the training problems; the held-out ones share no chain of operations with them."""
    chosen = [data.num_examples, data.seed, data.language]
    path = root / f"arithmetic-{make_key('arithmetic', chosen, None)}" / "problems.jsonl"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_aside(path) as file:
            for problem in make_problems(data.num_examples, data.seed, "train", data.language):
                file.write(json_line(to_chat(problem_to_example(problem, "reasoning"))))
    return path


def _question(record):
    """What a benchmark's item asks, where its record has an answer too; None: there is no telling the two apart."""
    try:
        messages = to_example(record, "fast").messages[:-1]
    except ValueError:
        return record.get("prompt") or record.get("question")
    return "\n".join(message.content for message in messages)


def _read(work, sources, config, engine):
    if not (work / "pool.json").exists():
        say("reading: " + ", ".join(f"{source.name} ({len(list_files(source))} files)" for source in sources))
        began, last = time.monotonic(), time.monotonic()

        def on_progress(count):  # how many there will be is not known
            nonlocal last
            if time.monotonic() - last > 10:
                last = time.monotonic()
                say(f"reading: {count:,} documents, {count / (last - began):,.0f} a second")

        write_pool(work, sources, config.on_error == "skip", on_progress, engine.map_batches)
    pool = Pool(work)
    lost = f", {pool.num_malformed:,} malformed, see {work / 'malformed.jsonl'}" if pool.num_malformed else ""
    say(f"read: {len(pool):,} documents{lost}")
    return pool


def _write_rows(flow, documents, recipe, tokenizer, folder, engine, difficulty_N):
    """Tokenizes, sets documents aside, mixes and packs. Returns the Documents in the mixture, and what the summary
    says of them."""
    data, config, is_text = recipe.data, recipe.curate, recipe.data.dress == "text"
    tokenized, pool = documents, documents.pool
    scratch = flow.scratch("tokens", [tokenizer.digest, template_digest(), data.dress])
    scratch.mkdir(exist_ok=True)
    pieces = cut(tokenized)
    work = functools.partial(_tokenize, str(Path(tokenizer.model_file).resolve()), data.dress, str(scratch.resolve()))
    lengths, count = [], 0
    with Reporter("tokenize", tokenized.numbers.size) as reporter:
        for found in engine.map(work, pool, list(enumerate(pieces))):
            lengths.append(found)
            count += found.size
            reporter.advance(count)
    lengths_D = np.concatenate(lengths)
    documents = flow.run("unusable", documents, data.seq_len, lambda documents, scratch, reporter:
                         too_long_or_without_reply(documents, lengths_D, data.seq_len, is_text))
    documents = flow.run("heldout", documents, data.num_heldout, lambda documents, scratch, reporter:
                         held_out(documents, data.num_heldout))
    aside = [finding.document for finding in read_findings(flow.work / flow.stages[-1]["file"])]
    places = np.searchsorted(tokenized.numbers, documents.numbers)
    categories = [source["category"] for source in pool.sources]
    size = config.size or None
    if tokens := _tokens_of_the_run(recipe):
        size = int(tokens if recipe.mix.unit == "tokens" else tokens / lengths_D[places].mean())
    mixture = mix_samples(recipe.mix, categories, pool.sources_N[documents.numbers],
                          lengths_D[places], difficulty_N[documents.numbers], size, recipe.seed,
                          at_most=not config.size)
    if mixture.missing:
        say(f"mix.on_missing=renormalise: no sample of {', '.join(mixture.missing)}; the others share what it had")
    settings = [as_dict(recipe.mix), size, recipe.seed]
    drawn = Documents(pool, documents.numbers[np.unique(mixture.order_M)])
    mixed = flow.run("mix", documents, settings, lambda documents, scratch, reporter: (
        Finding(int(number), "not_drawn") for number in np.setdiff1d(documents.numbers, drawn.numbers)))
    order, places_M = flow.work / f"order-{flow.key}.bin", places[mixture.order_M]
    write_order(order, lengths_D, places_M, np.cumsum([0, *(piece.size for piece in pieces)])[:-1])
    samples_per_shard = bound_samples(config.samples_per_shard, lengths_D[places_M].mean())
    num_shards = -(-places_M.size // samples_per_shard)
    folder.mkdir(exist_ok=True)
    _write_documents(folder / "heldout.jsonl", Documents(pool, np.array(aside, np.int64)), data.dress, engine)
    if not (folder / "tokenizer.model").exists():
        write_aside(folder / "tokenizer.model", Path(tokenizer.model_file).read_bytes())
    with Reporter("pack", num_shards) as reporter:
        packed = write_packed(folder, places_M.size, MixedTokens(str(order), str(scratch)), seq_len=data.seq_len,
                              pad_id=tokenizer.pad_id,
                              samples_per_shard=samples_per_shard, on_long="split" if is_text else "drop",
                              binding={"tokenizer": tokenizer.digest, "template": template_digest(),
                                       "made_from": flow.key}, num_processes=_num_processes(recipe),
                              workers=engine.workers, on_progress=lambda done, _: reporter.advance(done))
    order.unlink()
    counts = {name: sum(getattr(shard, name) for shard in packed.counts)
              for name in ("rows", "samples", "tokens", "targets")}
    totals = counts | {"seq_len": data.seq_len, "fill": counts["tokens"] / (counts["rows"] * data.seq_len)}
    if mixed.numbers.size < documents.numbers.size and not config.size:
        scarce = max(mixture.report, key=lambda part: part.epochs)
        say(f"mix: {scarce.name} has so little that its share bounds the mixture, {scarce.epochs:.2f} epochs of it: "
            f"{documents.numbers.size - mixed.numbers.size:,} documents of the others are not drawn; add to it, or "
            "change mix.ratio, mix.weights or mix.max_epochs")
    for part in mixture.report:
        say(f"  {part.name:24} {part.share:7.2%} of the {recipe.mix.unit} (wanted {part.wanted:.2%}), "
            f"{part.num_samples:,} samples, {part.epochs:.2f} epochs")
    say(f"rows: {totals['rows']:,} of {data.seq_len:,} tokens, fill {totals['fill']:.1%}, {totals['targets']:,} "
        f"supervised tokens, {len(aside):,} documents held out; {folder}")
    return mixed, {"mixture": [part._asdict() for part in mixture.report], "rows": totals}


def _strata(documents):
    """A number for language and category of each document: scripts differ in bytes per character."""
    pool, numbers = documents
    categories = list(dict.fromkeys(source["category"] for source in pool.sources))
    category_of = np.array([categories.index(source["category"]) for source in pool.sources])
    languages_D = pool.languages_N[numbers].astype(np.int64)
    return (languages_D * len(categories) + category_of[pool.sources_N[numbers]]).tolist()


def _write_documents(path, documents, dress, engine, labels=None):
    """The documents as conversations, or as plain documents. labels: a file with the attributes of these and others."""
    pieces, count = cut(documents), 0
    known = read_lines_about(labels, pieces) if labels else itertools.repeat(None)
    with Reporter("write", documents.numbers.size) as reporter, open_aside(path) as file:
        written = engine.map_batches(functools.partial(_dressed, documents.pool, dress),
                                     zip(pieces, known, strict=False))
        for numbers, lines in zip(pieces, written, strict=True):
            file.write(lines)
            count += numbers.size
            reporter.advance(count)


def _dressed(pool, dress, piece):
    """The lines of documents. piece: their numbers, and the lines of their attributes or None."""
    numbers, known = piece
    fields, lines = {source["name"]: source["fields"] for source in pool.sources}, []
    for document, about in zip(pool.documents(numbers), known or itertools.repeat(None), strict=False):
        if dress == "text":
            line = {"text": document.text}
        else:
            line = to_chat(to_example(document.record, dress, fields[document.source]))
        origin = {"source": document.source, "language": document.language, "category": document.category,
                  "licence": document.licence, "attributes": about and to_json(_parse_attributes(about)[1])}
        lines.append(json_line(line | {name: value for name, value in origin.items() if value is not None}))
    return b"".join(lines)


def _write_dropped(folder, flow, pool, engine):
    """dropped/ and reported/<stage>.jsonl: every document about which a stage found something, and what."""
    for part in ("dropped", "reported"):
        shutil.rmtree(folder / part, ignore_errors=True)
    for place, stage in enumerate(flow.stages, 1):
        for part in ("dropped", "reported"):
            if not stage[part]:
                continue
            (folder / part).mkdir(exist_ok=True)
            with (open(flow.work / stage["file"], "rb") as found,
                  open_aside(folder / part / f"{place}-{stage['name']}.jsonl") as file):
                chunks = _chunks(found, lambda line: int(pool.char_counts_N[int(line[1 : line.index(b",")])]))
                file.writelines(engine.map(functools.partial(_described, stage["name"], part == "dropped"), pool,
                                           chunks))


def _described(stage, is_drop, pool, found):
    """The lines of findings, lines too, that drop or only report; each has the record in the bytes of the pool."""
    findings, lines = [finding for finding in map(_parse_finding, found) if finding.drop == is_drop], []
    records = pool.records_bytes([finding.document for finding in findings])
    for finding, record in zip(findings, records, strict=True):
        file, place = pool.place(finding.document)
        line = {"stage": stage, "reason": finding.reason, "score": finding.score}
        if isinstance(finding.partner, int):
            line["partner"] = dict(zip(("file", "line"), pool.place(finding.partner), strict=True))
        elif finding.partner is not None:
            line["partner"] = finding.partner
        line |= (finding.details or {}) | {"source": pool.sources[pool.sources_N[finding.document]]["name"],
                                           "file": file, "line": place}
        lines.append(json_line(line)[:-2] + b', "record": ' + escape_halves(record) + b"}\n")
    return b"".join(lines)


def _chunks(values, count_chars=lambda value: 0):
    """Lists of _CHUNK values, or of fewer with _CHUNK_CHARS characters."""
    chunk, chars = [], 0
    for value in values:
        chunk.append(value)
        chars += count_chars(value)
        if len(chunk) == _CHUNK or chars > _CHUNK_CHARS:
            yield chunk
            chunk, chars = [], 0
    if chunk:
        yield chunk


main = entry_point(run)

if __name__ == "__main__":
    from mindpangu.curate import main  # not of __main__, which Ray would send whole to its workers

    main()
