"""The benchmarks' published files: what each is called, where it is to be had, under which licence, and its reader.

Nothing is ever fetched. A reader turns the files in a folder into {split: [document, ...]}; documents of a benchmark
have the fields that lm-eval's own task reads, so that one reader serves its task and ours.
"""

import csv
import gzip
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Source(NamedTuple):
    """A benchmark's files within the folder of all benchmarks."""

    title: str
    patterns: tuple[str, ...]  # glob patterns, one or more files each
    read: Callable  # (folder of all benchmarks) -> {split: [dict]}
    num_items: int | None  # that are scored, as published; None: not published
    url: str
    licence: str
    run: bool  # whether this code has run on the published files themselves, or on items of their form only


def missing_patterns(source, folder):
    return [pattern for pattern in source.patterns if not any(Path(folder).glob(pattern))]


def digest(source, folder):
    """A hash over the names and bytes of the source's files, hexadecimal."""
    found = hashlib.sha256()
    for path in sorted({path for pattern in source.patterns for path in Path(folder).glob(pattern)}):
        found.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()[:32]


# ---- Files -----------------------------------------------------------------------------------------------------------

def _find(folder, pattern):
    paths = sorted(Path(folder).glob(pattern))
    if not paths:
        raise ValueError(f"{Path(folder) / pattern} does not exist: put the published file there, or give another "
                         "eval.benchmarks_dir; python -m mindpangu.evaluate --list-tasks names the sources.")
    return paths


def _read_json(path):
    """A file that is one JSON value."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): fetch it again.") from None


def _read_jsonl(path):
    """A file with a JSON object a line, packed with gzip or not."""
    data = path.read_bytes()
    try:
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
        # Not splitlines: benchmark texts hold U+2028 and the like, which it takes for ends of lines.
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path}: expected a JSON object a line ({error}): fetch it again.") from None


def _read_csv(path):
    """Rows of a comma-separated file, lists of strings."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        return [row for row in csv.reader(file) if row]


def _column_reader(path, rows, names):
    """Dictionaries of the named columns of rows whose first one is the header."""
    absent = [name for name in names if name not in rows[0]]
    if absent:
        raise ValueError(f"{path} has the columns {rows[0]}: expected {', '.join(absent)} among them.")
    places = [rows[0].index(name) for name in names]
    return [{name: row[place] for name, place in zip(names, places, strict=True)} for row in rows[1:]]


def _subject(path, ending):
    return path.name.removesuffix(ending)


# ---- Readers, by benchmark -------------------------------------------------------------------------------------------

def read_mmlu(folder):
    """57 subjects in {dev,test}/<subject>_{dev,test}.csv: question, four choices, the answer's letter; no header.

    Also the re-export with a header and the answer as an index.
    """
    splits = {}
    for split in ("dev", "test"):
        splits[split] = documents = []
        for path in _find(folder, f"mmlu/{split}/*_{split}.csv"):
            rows = _read_csv(path)
            for row in rows[1:] if rows[0][0] == "question" and rows[0][-1] == "answer" else rows:
                if len(row) != 6 or row[5] not in tuple("ABCD0123"):
                    raise ValueError(f"{path}: {row} is no question with four choices and an answer, A to D or 0 to 3.")
                answer = int(row[5]) if row[5].isdigit() else "ABCD".index(row[5])
                subject = _subject(path, f"_{split}.csv")
                documents.append({"question": row[0], "choices": row[1:5], "answer": answer, "subject": subject})
    return splits


def read_cmmlu(folder):
    """67 subjects in {dev,test}/<subject>.csv, with a header: Question, A, B, C, D, Answer."""
    names = ("Question", "A", "B", "C", "D", "Answer")
    return {split: [document | {"subject": path.stem} for path in _find(folder, f"cmmlu/{split}/*.csv")
                    for document in _column_reader(path, _read_csv(path), names)] for split in ("dev", "test")}


def read_ceval(folder):
    """52 subjects in {dev,val}/<subject>_{dev,val}.csv, with a header; the answers of test are not public."""
    names = ("question", "A", "B", "C", "D", "answer")
    return {split: [document | {"subject": _subject(path, f"_{split}.csv")}
                    for path in _find(folder, f"ceval/{split}/*_{split}.csv")
                    for document in _column_reader(path, _read_csv(path), names)] for split in ("dev", "val")}


def read_cluewsc(folder):
    """FewCLUE's lines {"text", "target": {"span1_text", "span2_text", ...}, "label": "true" or "false"}."""
    return {split: [{"text": line["text"], "span1": line["target"]["span1_text"], "span2": line["target"]["span2_text"],
                     "label": int(line["label"] == "true")}
                    for line in _read_jsonl(_find(folder, f"cluewsc/{name}.json")[0])]
            for split, name in (("train", "train_few_all"), ("test", "test_public"))}


def read_gsm8k(folder):
    return {split: _read_jsonl(_find(folder, f"gsm8k/{split}.jsonl")[0]) for split in ("train", "test")}


# What one carrier of MATH-500 appends to each problem; the task itself puts it there.
BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."


def read_math500(folder):
    """Lines {"problem", "answer", ...}; or {"prompt", "answer"} with the instruction behind the problem."""
    lines = _read_jsonl(_find(folder, "math500/*.jsonl")[0])
    return {"test": [{"problem": line["problem"] if "problem" in line else line["prompt"].removesuffix(BOXED),
                      "answer": line["answer"]} for line in lines]}


def read_math(folder):
    """{train,test}/<subject>/<n>.json: {"problem", "level", "type", "solution"}."""
    splits = {}
    for split in ("train", "test"):
        paths = sorted(_find(folder, f"math/{split}/*/*.json"), key=lambda path: (path.parent.name, int(path.stem)))
        splits[split] = [{"problem": document["problem"], "solution": document["solution"],
                          "subject": path.parent.name, "answer": last_boxed(document["solution"])}
                         for path, document in ((path, _read_json(path)) for path in paths)]
    return splits


def last_boxed(solution):
    r"""The content of the last \boxed{...} or \fbox{...}, or the word behind a bare \boxed; "" if there is none."""
    found = list(re.finditer(r"\\(?:boxed|fbox)\s*", solution))
    if not found:
        return ""
    rest, depth = solution[found[-1].end():], 0
    if not rest.startswith("{"):
        return re.match(r"[^\s$]*", rest)[0]
    for place, character in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return rest[1:place]
    return ""


def read_drop(folder):
    """drop_dataset_{train,dev}.json: {passage id: {"passage", "qa_pairs": [{"question", "answer", ...}]}}."""
    splits = {}
    for split, name in (("train", "train"), ("validation", "dev")):
        [path] = _find(folder, f"drop/drop_dataset_{name}.json")
        splits[split] = [
            {"query_id": pair["query_id"], "passage": passage["passage"], "question": pair["question"],
             "answer": _drop_answer(pair["answer"]),
             "validated_answers": _columns([_drop_answer(a) for a in pair.get("validated_answers", [])])}
            for passage in _read_json(path).values() for pair in passage["qa_pairs"]]
    return splits


def _drop_answer(answer):
    date = answer.get("date") or {}
    return {"number": str(answer.get("number", "")), "spans": list(answer.get("spans", [])),
            "date": {part: str(date.get(part, "")) for part in ("day", "month", "year")}}


def _columns(answers):
    return {name: [answer[name] for answer in answers] for name in ("number", "spans", "date")}


# OpenCompass's four orders of the choices, taken in turn from the second on: no letter is right more often.
_ORDERS = ("ABCD", "BCDA", "CDAB", "DABC")


def read_gpqa(folder):
    """gpqa_diamond.csv, with a header: Question, Correct Answer, Incorrect Answer 1 to 3."""
    [path] = _find(folder, "gpqa/gpqa_diamond.csv")
    names = ("Question", "Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3)))
    documents = []
    for place, row in enumerate(_column_reader(path, _read_csv(path), names), start=1):
        options = [row[name] for name in names[1:]]
        order = _ORDERS[place % 4]
        documents.append({"question": row["Question"], "choices": [options["ABCD".index(letter)] for letter in order],
                          "answer": order.index("A")})
    return {"test": documents}


def _code_tests(document):
    """The tests of an MBPP document as programs: each assertion behind the set-up that all of them need."""
    setup = document.get("test_setup_code") or "\n".join(document.get("test_imports", []))
    return [f"{setup}\n{test}" if setup else test for test in document["test_list"]]


def read_mbpp(folder):
    """mbpp.jsonl: tasks 11 to 510 are the test split, 1 to 10 are for prompts."""
    return _split_mbpp(_read_jsonl(_find(folder, "mbpp/mbpp.jsonl")[0]), "text")


def read_mbpp_sanitized(folder):
    """sanitized-mbpp.json, one list: 257 of its tasks are in the test split."""
    return _split_mbpp(_read_json(_find(folder, "mbpp/sanitized-mbpp.json")[0]), "prompt")


def _split_mbpp(tasks, text):
    documents = [{"task_id": task["task_id"], "text": task[text], "code": task["code"].replace("\r\n", "\n").rstrip(),
                  "test_list": task["test_list"], "tests": _code_tests(task)} for task in tasks]
    # Tasks 2 to 4 are the examples of the data set's authors (Austin et al. 2021, arXiv:2108.07732, 3.1).
    return {"prompt": [document for document in documents if document["task_id"] in (2, 3, 4)],
            "test": [document for document in documents if 11 <= document["task_id"] <= 510]}


def read_humaneval(folder):
    return {"test": _read_jsonl(_find(folder, "humaneval/HumanEval.jsonl.gz")[0])}


def read_ifeval(folder):
    """Lines {"key", "prompt", "instruction_id_list", "kwargs"}.

    lm-eval reads these documents from Arrow tables, where every dictionary of "kwargs" has all names and None for most.
    """
    return {"train": _read_jsonl(_find(folder, "ifeval/input_data.jsonl")[0])}


def read_bbh(folder):
    """27 tasks in bbh/<task>.json: {"examples": [{"input", "target"}]}."""
    return {"test": [example | {"subject": path.stem} for path in _find(folder, "bbh/bbh/*.json")
                     for example in _read_json(path)["examples"]]}


def read_hellaswag(folder):
    """hellaswag_{train,val}.jsonl: {"ctx_a", "ctx_b", "activity_label", "endings", "label", ...}."""
    names = ("ctx_a", "ctx_b", "activity_label", "endings", "label")
    return {split: [{name: line[name] for name in names}
                    for line in _read_jsonl(_find(folder, f"hellaswag/hellaswag_{file}.jsonl")[0])]
            for split, file in (("train", "train"), ("validation", "val"))}


def read_winogrande(folder):
    """dev.jsonl, and train_xs.jsonl for the examples, as OpenCompass takes them."""
    return {split: _read_jsonl(_find(folder, f"winogrande/{file}.jsonl")[0])
            for split, file in (("train", "train_xs"), ("validation", "dev"))}


SOURCES = {
    "mmlu": Source("MMLU", ("mmlu/dev/*_dev.csv", "mmlu/test/*_test.csv"), read_mmlu, 14042,
                   "https://people.eecs.berkeley.edu/~hendrycks/data.tar", "MIT", True),
    "cmmlu": Source("CMMLU", ("cmmlu/dev/*.csv", "cmmlu/test/*.csv"), read_cmmlu, None,
                    "https://huggingface.co/datasets/haonan-li/cmmlu (cmmlu_v1_0_1.zip)",
                    "CC BY-NC-SA 4.0: not for commercial use", False),
    "ceval": Source("C-Eval", ("ceval/dev/*_dev.csv", "ceval/val/*_val.csv"), read_ceval, 1346,
                    "https://huggingface.co/datasets/ceval/ceval-exam (ceval-exam.zip)",
                    "CC BY-NC-SA 4.0: not for commercial use", False),
    "ifeval": Source("IF-Eval", ("ifeval/input_data.jsonl",), read_ifeval, 541,
                     "https://github.com/google-research/google-research/tree/master/instruction_following_eval/data",
                     "Apache-2.0", True),
    "cluewsc": Source("CLUEWSC", ("cluewsc/train_few_all.json", "cluewsc/test_public.json"), read_cluewsc, 976,
                      "https://github.com/CLUEbenchmark/FewCLUE/tree/main/datasets/cluewsc",
                      "none stated in the repository", False),
    "gsm8k": Source("GSM8K", ("gsm8k/train.jsonl", "gsm8k/test.jsonl"), read_gsm8k, 1319,
                    "https://github.com/openai/grade-school-math/tree/master/grade_school_math/data", "MIT", True),
    "math500": Source("MATH-500", ("math500/*.jsonl",), read_math500, 500,
                      "https://huggingface.co/datasets/HuggingFaceH4/MATH-500 (test.jsonl)", "MIT", True),
    "math": Source("MATH", ("math/train/*/*.json", "math/test/*/*.json"), read_math, 5000,
                   "https://github.com/hendrycks/math (MATH.tar)", "MIT", False),
    "drop": Source("DROP", ("drop/drop_dataset_train.json", "drop/drop_dataset_dev.json"), read_drop, None,
                   "https://allenai.org/data/drop (drop_dataset.zip)", "CC BY-SA 4.0", False),
    "gpqa_diamond": Source("GPQA-Diamond", ("gpqa/gpqa_diamond.csv",), read_gpqa, 198,
                           "https://github.com/idavidrein/gpqa (dataset.zip, with a password)",
                           "CC BY 4.0; its authors ask never to show its questions online", False),
    "mbpp": Source("MBPP", ("mbpp/mbpp.jsonl",), read_mbpp, 500,
                   "https://github.com/google-research/google-research/tree/master/mbpp", "CC BY 4.0", True),
    "mbpp_sanitized": Source("MBPP (sanitized)", ("mbpp/sanitized-mbpp.json",), read_mbpp_sanitized, 257,
                             "https://github.com/google-research/google-research/tree/master/mbpp", "CC BY 4.0", True),
    "humaneval": Source("HumanEval", ("humaneval/HumanEval.jsonl.gz",), read_humaneval, 164,
                        "https://github.com/openai/human-eval/tree/master/data", "MIT", True),
    "bbh": Source("BigBenchHard", ("bbh/bbh/*.json",), read_bbh, 6511,
                  "https://github.com/suzgunmirac/BIG-Bench-Hard", "MIT", True),
    "hellaswag": Source("HellaSwag", ("hellaswag/hellaswag_train.jsonl", "hellaswag/hellaswag_val.jsonl"),
                        read_hellaswag, 10042, "https://github.com/rowanz/hellaswag/tree/master/data", "MIT", False),
    "winogrande": Source("WinoGrande", ("winogrande/train_xs.jsonl", "winogrande/dev.jsonl"), read_winogrande, 1267,
                         "https://winogrande.allenai.org (winogrande_1.1.zip)", "CC BY", True),
}
