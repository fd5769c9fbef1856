"""python -m mindpangu.tools.bench_curate FOLDER [name ...]: curation against named peers, in CPU seconds.

FOLDER holds public benchmark files: bbh, gsm8k, humaneval, ifeval, math500, mbpp, mmlu, winogrande. Prints a line per
row; zip_in_full, a quarter of an hour, only when named.
"""

import csv
import gzip
import json
import lzma
import random
import sys
import time
import zlib
from pathlib import Path

import numpy as np
from datasketch import MinHash, MinHashLSH

from mindpangu.data.decontaminate import CONTAINED_WORDS, Item, find_items, index_items
from mindpangu.data.dedup import near_duplicates, shingle
from mindpangu.data.words import hash_words
from mindpangu.data.zip_selection import select

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


def benchmark_items(folder):
    """The questions of the benchmark files in folder, as Items."""
    folder = Path(folder)
    items = []
    files = (("gsm8k", "test.jsonl", "question"), ("mbpp", "mbpp.jsonl", "text"),
             ("ifeval", "input_data.jsonl", "prompt"), ("math500", "math500.jsonl", "prompt"),
             ("humaneval", "HumanEval.jsonl.gz", "prompt"), ("winogrande", "dev.jsonl", "sentence"))
    for name, file, key in files:
        data = (folder / name / file).read_bytes()
        lines = (gzip.decompress(data) if file.endswith(".gz") else data).decode().splitlines()
        items += [Item(name, str(number), json.loads(line)[key]) for number, line in enumerate(lines, 1) if line]
    for path in sorted(folder.glob("bbh/bbh/*.json")):
        for number, example in enumerate(json.loads(path.read_text("utf-8"))["examples"]):
            items.append(Item("bbh", f"{path.stem} {number}", example["input"]))
    for path in sorted(folder.glob("mmlu/test/*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            for number, record in enumerate(csv.DictReader(file)):
                items.append(Item("mmlu", f"{path.stem} {number}", record["question"]))
    return [item for item in items if item.text.strip()]


def bench_decontamination(folder):
    """50k short documents against all benchmark files; then every item of 8 or more words put into one of them."""
    items, documents = benchmark_items(folder), short_documents(folder, 50_000)
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
    documents += [item.text for item in benchmark_items(folder) if item.benchmark in ("mmlu", "ifeval", "math500")]
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


BENCHMARKS = {"near_duplicates": bench_near_duplicates, "decontamination": bench_decontamination, "zip": bench_zip,
              "zip_in_full": bench_zip_in_full}


def main(folder, *names):
    for name in names or [name for name in BENCHMARKS if name != "zip_in_full"]:
        for row in BENCHMARKS[name](folder):
            better = ratio(row) if row.peer else row.ours[0]
            met = "" if row.wanted is None else "met" if better >= row.wanted else "MISSED"
            peer = f"{np.median(row.peer):.6g}" if row.peer else "-"
            print(f"{row.name:85} {np.median(row.ours):>12.6g} {peer:>12} {row.unit:12} {better:>8.4g} "
                  f"{row.wanted or '':>6} {met}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
