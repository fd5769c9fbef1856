"""python -m mindpangu.tools.bench_curate FOLDER [name ...]: curation against named peers, in CPU seconds.

FOLDER holds public benchmark files: bbh, gsm8k, humaneval, ifeval, math500, mbpp, mmlu, winogrande. Prints a line per
row and writes bench_data.json; zip_in_full, a quarter of an hour, only when named. Peers: pip install mindpangu[bench].
"""

import collections
import json
import lzma
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from pathlib import Path

import numpy as np
from datasketch import MinHash, MinHashLSH

from mindpangu.benchmarks.items import list_items
from mindpangu.config import load_recipe
from mindpangu.data.decontaminate import CONTAINED_WORDS, find_items, index_items
from mindpangu.data.dedup import near_duplicates, shingle
from mindpangu.data.pack import pack_best_fit
from mindpangu.data.words import hash_words
from mindpangu.data.zip_selection import select
from mindpangu.pipeline import built_tokenizer

from .bench_rows import Row, alternate, rates, ratio


def gsm8k(folder, name="train"):
    return [json.loads(line) for line in Path(folder, "gsm8k", f"{name}.jsonl").read_text("utf-8").splitlines()]


def short_documents(folder, num_documents, seed=0):
    """Documents of 2 to 4 sentences of GSM8K's questions, a fifth of the words exchanged: 41 words on average.

    A fifth of them, and of their copies, has a copy with 1 to 3 more words exchanged.
    """
    rng = random.Random(seed)
    questions = [record["question"] for record in gsm8k(folder)]
    vocabulary = sorted({word for question in questions for word in question.split()})
    documents = []
    while len(documents) < num_documents:
        sentences = [rng.choice(rng.choice(questions).split(". ")) for _ in range(rng.randint(2, 4))]
        words = [word if rng.random() < 0.8 else rng.choice(vocabulary) for word in " ".join(sentences).split()]
        documents.append(" ".join(words))
        while rng.random() < 0.2:
            copy = list(words)
            for _ in range(rng.randint(1, 3)):
                copy[rng.randrange(len(copy))] = rng.choice(vocabulary)
            documents.append(" ".join(copy))
    del documents[num_documents:]
    rng.shuffle(documents)
    return documents


def datasketch_shingles(document):
    words = document.lower().split()
    return [" ".join(words[w : w + 5]).encode() for w in range(max(1, len(words) - 4))]


def datasketch_one_each(documents):
    """Documents kept by datasketch with its own choice of bands at 0.7: a MinHash each, queried, then inserted."""
    lsh, num_kept = MinHashLSH(threshold=0.7, num_perm=128), 0
    for key, document in enumerate(documents):
        minhash = MinHash(num_perm=128)
        minhash.update_batch(datasketch_shingles(document))
        num_kept += not lsh.query(minhash)
        lsh.insert(key, minhash)
    return num_kept


def datasketch_bulk(documents):
    lsh, num_kept = MinHashLSH(threshold=0.7, num_perm=128), 0
    for key, minhash in enumerate(MinHash.bulk(map(datasketch_shingles, documents), num_perm=128)):
        num_kept += not lsh.query(minhash)
        lsh.insert(key, minhash)
    return num_kept


def similar_pairs(documents, threshold):
    """All pairs int64 [Q, 2] of documents whose sets of word 5-grams have at least that Jaccard similarity: exact."""
    from scipy.sparse import csr_matrix  # comes with datasketch

    shingles = shingle(documents)
    ids = np.unique(shingles.hashes_S, return_inverse=True)[1]
    has = csr_matrix((np.ones(ids.size, np.int32), ids, shingles.starts_D1), dtype=np.int32)
    has.sum_duplicates()
    has.data[:] = 1
    sizes, pairs = has.getnnz(1), []
    for first in range(0, len(documents), 1000):
        shared = (has[first : first + 1000] @ has.T).tocoo()
        left = shared.row + first
        similar = shared.data / (sizes[left] + sizes[shared.col] - shared.data) >= threshold
        pairs.append(np.stack([left, shared.col], 1)[similar & (left < shared.col)])
    return np.concatenate(pairs)


def bench_near_duplicates(folder):
    """50k short documents, 128 permutations, word 5-grams, threshold 0.7; ours verifies and finds components."""
    documents = short_documents(folder, 50_000)
    rows = []
    for name, peer, num_runs, wanted in (("one MinHash a document", datasketch_one_each, 1, 20),
                                         ("bulk", datasketch_bulk, 3, 5)):
        ours, theirs = alternate(lambda: near_duplicates(documents), lambda peer=peer: peer(documents), num_runs,
                                 time.process_time)
        rows.append(Row(f"near-duplicates, 50k documents, beside {name}", "documents/s", rates(50_000, ours),
                        f"datasketch, {name}", rates(50_000, theirs), wanted))
    exact = similar_pairs(documents, 0.7)
    partners_D = near_duplicates(documents).partners_D
    found = (partners_D[exact[:, 0]] == partners_D[exact[:, 1]]).mean()
    # Ours links every document through verified pairs, so those of a component are to be together in the exact graph.
    component_D = components(exact, len(documents))
    right = (component_D == component_D[partners_D])[partners_D != np.arange(len(documents))].mean()
    return [*rows,
            Row(f"near-duplicates, recall of {len(exact)} pairs at Jaccard >= 0.7, all pairs", "recall", [float(found)],
                wanted=0.995),
            Row("near-duplicates, precision of the dropped documents", "precision", [float(right)], wanted=1)]


def components(pairs, num_documents):
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    edges = coo_matrix((np.ones(len(pairs)), pairs.T), shape=(num_documents, num_documents))
    return connected_components(edges, directed=False)[1]


def bench_decontamination(folder):
    """50k short documents against all benchmark files; then every item of 8 or more words put into one of them."""
    items, documents = list_items(folder)[0], short_documents(folder, 50_000)
    began = time.process_time()
    index = index_items(items)
    building = time.process_time() - began
    seconds = []
    for _ in range(3):
        began = time.process_time()
        find_items(documents, index)
        seconds.append(time.process_time() - began)
    num_words = np.diff(hash_words([item.text for item in items]).starts_D1)
    contained = np.flatnonzero(num_words >= CONTAINED_WORDS)
    around = [documents[i % len(documents)] for i in contained]
    planted = [f"{text[:40]}: {items[i].text.upper()} {text[40:]}" for i, text in zip(contained, around, strict=True)]
    found = {(hit.document, hit.benchmark, hit.item) for hit in find_items(planted, index)}
    recall = [(d, items[i].benchmark, items[i].name) in found for d, i in enumerate(contained)]
    return [Row(f"decontamination, 50k documents, {len(items)} items", "documents/s", rates(50_000, seconds),
                wanted=15_000),
            Row("decontamination, index", "s", [building]),
            Row(f"decontamination, recall of {len(recall)} planted items", "recall", [float(np.mean(recall))],
                wanted=1)]


def published_ratio(records):
    plain = str(records).encode()
    return len(plain) / len(zlib.compress(plain, 9))


def published_selection(pool, budget, k1, k2, k3):
    """ZIP.py's loop with ties by index: every list of records compressed as a whole."""
    scores, selected = [published_ratio([record]) for record in pool], []
    while len(selected) < budget:
        first = sorted(range(len(pool)), key=lambda n: (scores[n], n))[:k1]
        for n in first:
            scores[n] = published_ratio([pool[m] for m in selected] + [pool[n]])
        second = sorted(first, key=lambda n: (scores[n], n))[:k2]
        for n in second:
            scores[n] = 1e6
        picks = []
        while len(picks) < k3:
            ratios = {n: published_ratio([pool[m] for m in picks] + [pool[n]]) for n in second}
            picks.append(min((n for n in second if n not in picks), key=lambda n: (ratios[n], n)))
        selected += picks
    return selected


def published_seconds(pool, order, k1, k2, k3, every):
    """CPU seconds of published_selection that selects `order`, from every so many of its compressions."""
    total = 0.0
    for num_selected in range(0, len(order), k3):
        anchor = [pool[n] for n in order[:num_selected]]
        picks = [pool[n] for n in order[num_selected : num_selected + k3]]
        for prefix, count in [(anchor, k1), *((picks[:size], k2) for size in range(k3))]:
            candidates = pool[:: max(1, len(pool) * every // count)][: max(1, count // every)]
            began = time.process_time()
            for record in candidates:
                published_ratio([*prefix, record])
            total += (time.process_time() - began) * count / len(candidates)
    began = time.process_time()
    for record in pool[::every]:
        published_ratio([record])
    return total + (time.process_time() - began) * every


def bench_zip(folder):
    """1000 of GSM8K's training problems, K1 = 5000, K2 = 200, K3 = 100; the peer from each 50th of its compressions."""
    pool = gsm8k(folder)
    texts = [f"{record['question']}\n{record['answer']}" for record in pool]
    seconds = {}
    for engine, documents, compat in (("zlib_exact", pool, "repr"), ("zstd", texts, None)):
        began = time.process_time()
        picks = select(documents, 1000, engine, 5000, 200, 100, compat=compat)
        seconds[engine] = time.process_time() - began
        if engine == "zlib_exact":
            peer = published_seconds(pool, picks.tolist(), 5000, 200, 100, 50)
    return [Row(f"ZIP, {engine}, 1000 of {len(pool)}", "s", [seconds[engine]], "ZIP.py", [peer], wanted)
            for engine, wanted in (("zlib_exact", 25), ("zstd", 150))] + [_bench_zip_quality(folder)]


def _bench_zip_quality(folder):
    """How far LZMA packs what both engines pick of problems, code and questions without near-duplicates."""
    documents = [f"{record['question']}\n{record['answer']}" for record in gsm8k(folder)]
    for line in Path(folder, "mbpp", "mbpp.jsonl").read_text("utf-8").splitlines():
        record = json.loads(line)
        documents.append(f"{record['text']}\n{record['code']}")
    documents += [item.text for item in list_items(folder)[0] if item.benchmark in ("mmlu", "ifeval", "math500")]
    partners_D = near_duplicates(documents).partners_D
    documents = [document for d, document in enumerate(documents) if partners_D[d] == d]
    picked = ["\n".join(documents[n] for n in select(documents, 1000, engine, 5000, 200, 100)).encode()
              for engine in ("zstd", "zlib_exact")]
    size = min(map(len, picked))
    ratios = [[size / len(lzma.compress(text[:size]))] for text in picked]
    return Row(f"ZIP, LZMA ratio of {size} bytes picked by zstd of {len(documents)} mixed", "ratio", ratios[0],
               "zlib_exact", ratios[1], 1)


def bench_zip_in_full(folder):
    """As bench_zip, with the published loop run to its end, a quarter of an hour: the order is to be identical."""
    pool = gsm8k(folder)
    began = time.process_time()
    ours = select(pool, 1000, "zlib_exact", 5000, 200, 100, compat="repr").tolist()
    between = time.process_time()
    same = ours == published_selection(pool, 1000, 5000, 200, 100)
    return [Row("ZIP, zlib_exact, in full", "s", [between - began], "ZIP.py", [time.process_time() - between], 25),
            Row("ZIP, zlib_exact, order as published", "equal", [float(same)], wanted=1)]


def trl_best_fit(lengths_N, capacity):
    """Number of rows of best-fit decreasing as TRL packs (strategy "bfd"): its segment tree, and the loop around it."""
    from trl.data_utils import _SegmentTree

    tree, rows_with, rows = _SegmentTree(capacity), collections.defaultdict(collections.deque), []
    tree.add(capacity)
    order_N = np.argsort(-lengths_N, kind="stable")
    for length, sample in zip(lengths_N[order_N], order_N, strict=True):
        room = tree.search(length)
        if room < capacity:
            row = rows_with[room].popleft()
        else:
            row = {"samples": [], "length": 0}
            rows.append(row)
        row["samples"].append(sample)
        row["length"] += length
        if room < capacity and not rows_with[room]:
            tree.remove(room)
        rows_with[room - length].append(row)
        if room > length:
            tree.add(room - length)
    return len(rows)


def bench_packing(folder):
    """A million lengths into rows of 32768: three of reasoning (median 2981 tokens) for one of the others (330)."""
    rng, count = np.random.default_rng(0), 1_000_000
    lengths = [rng.lognormal(8.0, 0.9, 3 * count // 4), rng.lognormal(5.8, 1.0, count // 4)]
    lengths_N = np.clip(np.concatenate(lengths), 16, 32768).astype(np.int64)
    rng.shuffle(lengths_N)
    num_rows = []
    ours, theirs = alternate(lambda: num_rows.append(pack_best_fit(lengths_N, 32768)[1].size - 1),
                             lambda: trl_best_fit(lengths_N, 32768), 1, time.process_time)
    for _ in range(2):
        began = time.process_time()
        pack_best_fit(lengths_N, 32768)
        ours.append(time.process_time() - began)
    least = -(-int(lengths_N.sum()) // 32768)
    return [Row("packing, 1M lengths at 32K, 3:1", "samples/s", rates(count, ours), "TRL, bfd", rates(count, theirs),
                5),
            Row(f"packing, the least number of rows ({least}) over those used", "ratio", [least / num_rows[0]],
                wanted=1)]


def _pipeline(path, folder, *more):
    """Runs the command on a file in a process of its own; returns (wall seconds, summary.json)."""
    command = [sys.executable, "-m", "mindpangu.curate", "recipe=curate", f"run.root={folder}/runs",
               f"run.dir={folder}/run", f"curate.sources=[{{name: chats, paths: ['{path}']}}]", *more]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
    return time.perf_counter() - began, json.loads(Path(folder, "run", "summary.json").read_text(encoding="utf-8"))


def _tokenizer(folder):
    """That of the built-in problems."""
    return built_tokenizer(load_recipe(["recipe=curate", f"run.root={folder}/tokenizer"])).model_file


def bench_pipeline(folder):
    """The whole command on 50k short documents with replies: every stage, ZIP of 1000 with K1 = 5000, tokens, rows,
    report."""
    documents = short_documents(folder, 50_000)
    rng, answers = random.Random(1), [record["answer"] for record in gsm8k(folder)]
    seconds = []
    for _ in range(3):
        with tempfile.TemporaryDirectory() as aside:
            path = Path(aside, "chats.jsonl")
            with open(path, "w", encoding="utf-8") as file:
                for document in documents:
                    file.write(json.dumps({"question": document, "answer": rng.choice(answers)}) + "\n")
            elapsed, summary = _pipeline(path, aside,
                                         f"curate.decontaminate.benchmarks_dir={folder}", "curate.zip.budget=1000",
                                         "curate.zip.k1=5000", "data.seq_len=1024",
                                         f"data.tokenizer={_tokenizer(aside)}")
            seconds.append(elapsed)
    stages = ", ".join(f"{stage['name']} {stage['in']} -> {stage['out']}" for stage in summary["stages"])
    print(f"  {stages}")
    return [Row("whole pipeline, 50k documents, 2 processes, wall time from start to end", "documents/s",
                rates(50_000, seconds), wanted=3000)]


def bench_memory(folder, num_bytes=1 << 30):
    """1 GB of JSONL through every stage but the choice by ZIP; the most that all processes hold at a time."""
    questions, rng = [record["question"] for record in gsm8k(folder)], random.Random(0)
    vocabulary = sorted({word for question in questions for word in question.split()})
    with tempfile.TemporaryDirectory() as aside:
        path, count = Path(aside, "chats.jsonl"), 0
        with open(path, "w", encoding="utf-8") as file:
            while file.tell() < num_bytes:
                words = [word for _ in range(3) for word in rng.choice(questions).split()]
                words = [word if rng.random() < 0.7 else rng.choice(vocabulary) for word in words]
                file.write(json.dumps({"question": " ".join(words), "answer": " ".join(words[::-1])}) + "\n")
                count += 1
        peak, stop = [0], threading.Event()
        watcher = threading.Thread(target=_watch, args=(peak, stop))
        watcher.start()
        try:
            elapsed, summary = _pipeline(path, aside,
                                         f"curate.decontaminate.benchmarks_dir={folder}", "data.seq_len=1024",
                                         f"data.tokenizer={_tokenizer(aside)}")
        finally:
            stop.set()
            watcher.join()
    return [Row(f"1 GB of {count} documents through the pipeline, memory of all its processes", "GiB",
                [peak[0] / 2**30], "2 GiB", [2.0], 1),
            Row("1 GB through the pipeline", "documents/s", rates(count, [elapsed]))]


def _watch(peak, stop):
    """Every half second the memory of this process's descendants, each page counted once; peak[0]: the most."""
    while not stop.wait(0.5):
        parents = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
            except OSError:
                pass
        family, total = {os.getpid()}, 0
        while more := {pid for pid, parent in parents.items() if parent in family} - family:
            family |= more
        for pid in family - {os.getpid()}:
            try:
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
                total += 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
            except OSError:
                pass
        peak[0] = max(peak[0], total)


BENCHMARKS = {"near_duplicates": bench_near_duplicates, "decontamination": bench_decontamination, "zip": bench_zip,
              "packing": bench_packing, "pipeline": bench_pipeline, "memory": bench_memory,
              "zip_in_full": bench_zip_in_full}


def main(folder, *names):
    unknown = set(names) - BENCHMARKS.keys()
    if unknown or not Path(folder, "gsm8k").is_dir():
        raise SystemExit(f"usage: python -m mindpangu.tools.bench_curate FOLDER [{' | '.join(BENCHMARKS)} ...]; FOLDER "
                         "has the benchmarks' files, gsm8k/train.jsonl among them")
    records = []
    for name in names or [name for name in BENCHMARKS if name != "zip_in_full"]:
        for row in BENCHMARKS[name](folder):
            better = ratio(row) if row.peer else float(np.median(row.ours))
            met = None if row.wanted is None else better >= row.wanted
            peer = f"{np.median(row.peer):.6g}" if row.peer else "-"
            print(f"{row.name:85} {np.median(row.ours):>12.6g} {peer:>12} {row.unit:12} {better:>8.4g} "
                  f"{row.wanted or '':>6} {'' if met is None else 'met' if met else 'MISSED'}", flush=True)
            records.append({"name": row.name, "unit": row.unit, "ours": row.ours, "reference": row.peer_name,
                            "reference_values": list(row.peer), "ratio": better, "wanted": row.wanted, "met": met})
        Path("bench_data.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
