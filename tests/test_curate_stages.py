"""The stages of curation against plain Python on small sets; on processes and on Ray they find the same."""

import os
import random
import re
import signal
import threading
import time
import unicodedata
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from mindpangu import curate
from mindpangu.config import NearDuplicatesConfig, ZipConfig
from mindpangu.curate import Documents
from mindpangu.data import engine as engine_module
from mindpangu.data.decontaminate import Item
from mindpangu.data.dedup import near_duplicates
from mindpangu.data.engine import Local, cut
from mindpangu.data.pool import json_line, write_pool
from mindpangu.data.sources import Source
from mindpangu.data.zip_selection import select

WORDS = [f"w{n}" for n in range(400)] + list("水火山川日月大小中文字学") + ["😀", "naïve", "e\u0301t\u00e9"]


def documents_of(texts, folder):
    folder.mkdir(exist_ok=True)
    (folder / "texts.jsonl").write_bytes(b"".join(json_line({"text": text}) for text in texts))
    pool = write_pool(folder / "pool", [Source("texts", str(folder / "texts.jsonl"))])
    return Documents(pool, np.arange(len(pool)))


def planted(num_originals, seed):
    """Texts, and copies with case and spaces changed or a few words exchanged, in random order."""
    rng = random.Random(seed)
    texts = []
    for _ in range(num_originals):
        words = rng.choices(WORDS, k=rng.randint(8, 90))
        texts.append(" ".join(words))
        for _ in range(rng.randint(0, 2)):
            texts.append("  ".join(words).upper())
        for _ in range(rng.randint(0, 2)):
            copy = list(words)
            for _ in range(rng.randint(1, 3)):
                copy[rng.randrange(len(copy))] = rng.choice(WORDS)
            texts.append(" ".join(copy))
    rng.shuffle(texts)
    return texts


def nothing(count):
    pass


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return documents_of([*planted(60, 1), "a\0b", "x" * 1_000_000, "😀", "句。" * 30], tmp_path_factory.mktemp("small"))


def test_exact_duplicates_are_those_of_one_normalised_text(small):
    seen, expected = {}, []
    for number in small.numbers.tolist():
        text = " ".join(unicodedata.normalize("NFKC", small.pool.text(number)).casefold().split())
        if text in seen:
            expected.append((number, seen[text]))
        seen.setdefault(text, number)
    found = [(finding.document, finding.partner) for finding in curate.exact_duplicates(small)]
    assert len(expected) > 20 and found == expected


def test_benchmark_items_are_found_by_13_words_by_all_of_fewer_or_by_equality(tmp_path):
    rng = random.Random(2)
    items = [Item("long", str(n), " ".join(rng.choices(WORDS[:400], k=30))) for n in range(5)]
    items += [Item("middle", str(n), " ".join(rng.choices(WORDS[:400], k=10))) for n in range(5)]
    items += [Item("short", str(n), " ".join(rng.choices(WORDS[:400], k=4))) for n in range(5)]
    texts = []
    for item in items:
        words = item.text.split()
        around = rng.choices(WORDS[:400], k=20)
        texts += [" ".join(around + words[:13] + around), " ".join(around + words[3:15] + around), item.text.upper()]
    documents = documents_of(texts, tmp_path)

    def contaminated(text):
        words = text.lower().split()
        for item in items:
            needle = item.text.split()
            size = 13 if len(needle) >= 13 else len(needle)
            for place in range(len(needle) - size + 1):
                gram = needle[place : place + size]
                where = [w for w in range(len(words) - size + 1) if words[w : w + size] == gram]
                if where and (size >= 8 or len(words) == len(needle)):
                    return True
        return False

    with Local(1) as engine:
        curate.write_index(tmp_path / "index", items)
        found = list(curate.benchmarks(documents, tmp_path / "index", "drop", engine, nothing))
        reported = list(curate.benchmarks(documents, tmp_path / "index", "report", engine, nothing))
    assert [finding.document for finding in found] == [n for n, text in enumerate(texts) if contaminated(text)]
    assert 15 <= len(found) < len(texts)
    for finding in found:
        benchmark, item, begin, end = finding.details["hits"][0]
        words = texts[finding.document][begin:end].lower()
        assert words in next(i.text for i in items if (i.benchmark, i.name) == (benchmark, item))
    assert [finding.drop for finding in reported] == [False] * len(found)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_near_duplicates_in_parts_are_those_of_all_at_once(small, tmp_path, monkeypatch, num_processes):
    monkeypatch.setattr(curate, "_LINKED_CHARS", 2000)  # many parts
    monkeypatch.setattr(engine_module, "_PIECE_DOCUMENTS", 17)
    texts = [small.pool.text(number) for number in small.numbers]
    quality = np.random.default_rng(0).permutation(len(texts)).astype(float)
    expected = near_duplicates(texts, quality)
    with Local(num_processes) as engine:
        found = list(curate.near_duplicates_of(small, quality, NearDuplicatesConfig(), engine, tmp_path / "s", nothing))
    dropped = np.flatnonzero(expected.partners_D != np.arange(len(texts)))
    assert len(dropped) > 40
    assert {finding.document: (finding.partner, finding.score) for finding in found} == {
        int(d): (int(expected.partners_D[d]), float(expected.scores_D[d])) for d in dropped}


def test_near_duplicates_do_not_depend_on_the_order_of_the_documents(tmp_path):
    texts = list(dict.fromkeys(planted(40, 3)))
    quality = {text: place for place, text in enumerate(texts)}
    kept = []
    for seed in range(3):
        random.Random(seed).shuffle(texts)
        documents = documents_of(texts, tmp_path / str(seed))
        with Local(1) as engine:
            found = list(curate.near_duplicates_of(documents, np.array([float(quality[text]) for text in texts]),
                                                   NearDuplicatesConfig(), engine, tmp_path / "scratch", nothing))
        dropped = {finding.document for finding in found}
        kept.append({text for place, text in enumerate(texts) if place not in dropped})
    assert kept[0] == kept[1] == kept[2] and len(kept[0]) < len(texts)


@pytest.mark.parametrize("settings", [ZipConfig(budget=40, k1=60, k2=20, k3=10),
                                      ZipConfig(budget=40, k1=60, k2=20, k3=10, engine="zlib_exact"),
                                      ZipConfig(budget=40, k1=60, k2=20, k3=10, engine="zlib_exact", compat="repr")],
                         ids=["zstd", "zlib_exact", "repr"])
def test_the_selection_is_that_of_its_engine_and_goes_on_where_it_was_cut(small, tmp_path, monkeypatch, settings):
    texts = [small.pool.text(number) for number in small.numbers]
    records = [small.pool.record(number) for number in small.numbers]
    strata = [len(text) % 2 for text in texts]
    expected = select(records if settings.compat else texts, 40, settings.engine, 60, 20, 10, strata,
                      compat=settings.compat)
    monkeypatch.setattr(curate, "_SAVE_EVERY_S", 0)
    done = []

    def stop_at_20(count):
        done.append(count)
        if count >= 20 and len(done) < 100:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(curate.zip_selection(small, strata, settings, 1, tmp_path / "zip", stop_at_20))
    assert (tmp_path / "zip.shard").exists()
    rounds = []
    found = list(curate.zip_selection(small, strata, settings, 1, tmp_path / "zip", rounds.append))
    assert rounds[0] > 10, "it went on"
    assert sorted(set(range(len(texts))) - {finding.document for finding in found}) == sorted(expected.tolist())


def test_pieces_hold_every_document_once_in_order(small):
    for max_documents, max_chars in ((4096, 1 << 23), (5, 1 << 23), (4096, 500), (1, 1)):
        pieces = cut(small, max_documents, max_chars)
        assert np.concatenate(pieces).tolist() == small.numbers.tolist()
        sizes = [piece.size for piece in pieces]
        assert max(sizes) <= max_documents
        assert all(piece.size == 1 or small.pool.char_counts_N[piece].sum() <= max_chars for piece in pieces)


# ---- Workers ---------------------------------------------------------------------------------------------------------

def slow_pid(pool, numbers):
    time.sleep(0.2)
    return os.getpid()


def test_a_killed_worker_process_ends_the_work_with_advice(small):
    with pytest.raises(RuntimeError, match="a worker process ended in the middle of its work: .* run the command"):
        with Local(2) as engine:
            for pid in engine.map(slow_pid, small.pool, [small.numbers] * 100):
                os.kill(pid, signal.SIGKILL)


def kill_workers_at_work(killed, stop):
    """Kills the first process of each kind of Ray's tasks that is at work; appends its name to killed."""
    while not stop.wait(0.02):
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                name = path.read_bytes().split(b"\0")[0].decode()
                if re.match(r"ray::(Map|Hash|Shuffle)", name) and name not in killed:
                    os.kill(int(path.parent.name), signal.SIGKILL)
                    killed.append(name)
            except OSError:  # it has ended
                pass


@pytest.mark.long  # half a minute alone, minutes where other work takes the cores
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_ray_finds_the_same_and_killed_workers_change_nothing(small, tmp_path, monkeypatch):
    if not find_spec("ray"):
        pytest.skip("pip install 'mindpangu[ray]'")
    monkeypatch.setattr(engine_module, "_PIECE_DOCUMENTS", 17)
    items = [Item("planted", str(n), small.pool.text(n)) for n in range(0, 60, 7)]
    quality = np.arange(len(small.numbers), dtype=float)

    def survey(engine, folder):
        folder.mkdir()
        engine.ahead(curate.write_index, folder / "index", items)()
        return (list(curate.benchmarks(small, folder / "index", "drop", engine, nothing)),
                list(curate.near_duplicates_of(small, quality, NearDuplicatesConfig(), engine, folder / "n", nothing)))

    with Local(1) as engine:
        expected = survey(engine, tmp_path / "local")
    killed, stop = [], threading.Event()
    thread = threading.Thread(target=kill_workers_at_work, args=(killed, stop))
    with curate.make_engine("ray", 2) as engine:
        thread.start()
        try:
            found = survey(engine, tmp_path / "ray")
        finally:
            stop.set()
            thread.join()
    assert found == expected
    assert len(killed) >= 2, "tasks of several kinds were cut"


def test_without_ray_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'mindpangu[ray]'")):
        curate.make_engine("ray", 2)


def test_samples_of_a_mixture_are_read_from_the_pieces_that_they_were_tokenized_in(tmp_path):
    rng = np.random.default_rng(0)
    lengths_D, piece_starts = rng.integers(1, 6, 3000), np.array([0, 700, 2900])
    tokens = [np.arange(length, dtype=np.int32) + 10 * document for document, length in enumerate(lengths_D)]
    targets = [rng.random(length) < 0.5 for length in lengths_D]
    for piece, (first, end) in enumerate(zip(piece_starts, [*piece_starts[1:], 3000], strict=True)):
        (tmp_path / f"{piece:06d}.tokens").write_bytes(np.concatenate(tokens[first:end]).tobytes())
        (tmp_path / f"{piece:06d}.targets").write_bytes(np.concatenate(targets[first:end]).tobytes())
    places_M = rng.integers(0, 3000, 5000)
    curate.write_order(tmp_path / "order.bin", lengths_D, places_M, piece_starts)
    samples = curate.MixedTokens(str(tmp_path / "order.bin"), str(tmp_path))
    for first, end in ((0, 5000), (2047, 2050), (4999, 5000)):
        found = samples(first, end)
        assert len(found) == end - first
        for (found_tokens, found_targets), document in zip(found, places_M[first:end], strict=True):
            assert found_tokens.tolist() == tokens[document].tolist()
            assert found_targets.tolist() == targets[document].tolist()
