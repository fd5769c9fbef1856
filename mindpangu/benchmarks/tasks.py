"""The benchmarks as lm-eval's tasks over local files: its own where it has them, those of tasks/*.yaml elsewhere.

"instruct": zero-shot turns of the chat template, answers that end by themselves; "base": examples before the question,
as many as P1 table 3 says. See each YAML for where its prompt comes from.
"""

import ast
import functools
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from .files import SOURCES, missing_patterns

_OURS = Path(__file__).parent / "tasks"


class Benchmark(NamedTuple):
    """How a benchmark is asked and scored."""

    source: str  # key of files.SOURCES
    configure: Callable  # () -> [configuration of an lm-eval task, ...]
    metric: str  # of lm-eval's results
    answers: str = "none"  # lm-eval's filter, which picks the answer
    average: str = "micro"  # over items, or macro: over the subjects
    published: str | None = None  # its row in published.csv


def _lm_eval_tasks():
    return Path(find_spec("lm_eval").origin).parent / "tasks"


def _ours(name):
    """The configuration in tasks/<name>.yaml."""

    def configure():
        from lm_eval.tasks._yaml_loader import load_yaml

        return [load_yaml(_OURS / f"{name}.yaml")]

    return configure


def _lm_evals(pattern, source, **changes):
    """lm-eval's own configurations, their data replaced by local files: one task a subject where there are several."""

    def configure():
        from lm_eval.tasks._yaml_loader import load_yaml

        configurations = []
        for path in sorted(_lm_eval_tasks().glob(pattern)):
            found = load_yaml(path)
            if "task" not in found or "group" in found:
                continue
            for name in ("tag", "dataset_path"):
                found.pop(name, None)
            subject = found.pop("dataset_name", None) if "*" in pattern else None
            configurations.append(found | {"custom_dataset": load_documents, "dataset_name": None,
                                           "dataset_kwargs": {"source": source, "subject": subject}, **changes})
        return configurations

    return configure


def forms():
    """{"instruct" or "base": {name in the recipe: Benchmark}}, in the order of the papers' tables."""
    ours = {"metric": "score", "answers": "graded"}
    return {
        "instruct": {
            "mmlu": Benchmark("mmlu", _ours("mmlu"), **ours, published="MMLU"),
            "cmmlu": Benchmark("cmmlu", _ours("cmmlu"), **ours, published="CMMLU"),
            "ceval": Benchmark("ceval", _ours("ceval"), **ours, average="macro", published="C-Eval"),
            "ifeval": Benchmark("ifeval", _lm_evals("ifeval/ifeval.yaml", "ifeval"), "prompt_level_strict_acc",
                                published="IF-Eval"),
            "cluewsc": Benchmark("cluewsc", _ours("cluewsc"), **ours, published="CLUEWSC"),
            "gsm8k": Benchmark("gsm8k", _ours("gsm8k"), **ours, published="GSM8K"),
            "math500": Benchmark("math500", _ours("math500"), **ours, published="MATH-500"),
            "drop": Benchmark("drop", _ours("drop"), **ours, published="DROP"),
            "gpqa_diamond": Benchmark("gpqa_diamond", _ours("gpqa_diamond"), **ours, published="GPQA-Diamond"),
            # k/N of the papers' scores: the sanitized test set for instruct models, all 500 for base models.
            "mbpp_sanitized": Benchmark("mbpp_sanitized", _ours("mbpp_sanitized"), **ours, published="MBPP"),
            "mbpp": Benchmark("mbpp", _ours("mbpp"), **ours),
            "humaneval": Benchmark("humaneval", _ours("humaneval"), **ours, published="HumanEval"),
        },
        "base": {
            "mmlu": Benchmark("mmlu", _lm_evals("mmlu/default/mmlu_*.yaml", "mmlu", num_fewshot=5), "acc",
                              published="MMLU"),
            "bbh": Benchmark("bbh", _lm_evals("bbh/cot_fewshot/*.yaml", "bbh"), "exact_match", "get-answer",
                             average="macro", published="BigBenchHard"),
            "hellaswag": Benchmark("hellaswag", _lm_evals("hellaswag/hellaswag.yaml", "hellaswag", num_fewshot=10),
                                   "acc_norm", published="HellaSwag"),
            "winogrande": Benchmark("winogrande", _lm_evals("winogrande/default.yaml", "winogrande", num_fewshot=5),
                                    "acc", published="WinoGrande"),
            "cmmlu": Benchmark("cmmlu", _lm_evals("cmmlu/cmmlu_*.yaml", "cmmlu", num_fewshot=5), "acc",
                               published="CMMLU"),
            "ceval": Benchmark("ceval", _lm_evals("ceval/ceval-valid_*.yaml", "ceval", num_fewshot=5,
                                                  validation_split="val"), "acc", average="macro", published="C-Eval"),
            "cluewsc": Benchmark("cluewsc", _ours("base_cluewsc"), "acc", published="CLUEWSC"),
            "gsm8k": Benchmark("gsm8k", _lm_evals("gsm8k/gsm8k-cot.yaml", "gsm8k"), "exact_match", "flexible-extract",
                               published="GSM8K"),
            "math": Benchmark("math", _ours("base_math"), **ours, published="MATH"),
            "mbpp": Benchmark("mbpp", _ours("base_mbpp"), **ours, published="MBPP"),
            "humaneval": Benchmark("humaneval", _ours("base_humaneval"), **ours, published="HumanEval"),
        },
    }


def find_benchmarks(form, names):
    """{name: Benchmark}. Raises ValueError for an unknown name."""
    known = forms()[form]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"eval.tasks={list(names)}: {', '.join(unknown)} unknown with eval.form={form}; it has "
                         f"{', '.join(known)}.")
    return {name: known[name] for name in names}


def check_files(benchmarks, folder):
    """Raise ValueError with what is missing in the folder of benchmarks, where to get it and its licence."""
    missing = {}
    for name, benchmark in benchmarks.items():
        source = SOURCES[benchmark.source]
        if patterns := missing_patterns(source, folder):
            missing[name] = (f"  {name}: {', '.join(patterns)}\n    from {source.url}\n    licence: {source.licence}")
    if missing:
        there = [name for name in benchmarks if name not in missing]
        instead = f", or leave them out: 'eval.tasks=[{','.join(there)}]'" if there else ""
        raise ValueError(f"eval.benchmarks_dir={folder} lacks files (nothing is fetched):\n" +
                         "\n".join(missing.values()) + f"\nPut them there{instead}.")


def load_tasks(benchmarks, folder, num_fewshot=None):
    """{name: [lm-eval task, ...]} over the files in the folder of benchmarks.

    num_fewshot: examples before a question, instead of the task's own number where that is not 0.
    """
    from lm_eval.api.task import ConfigurableTask

    tasks = {}
    for name, benchmark in benchmarks.items():
        tasks[name] = []
        for configuration in benchmark.configure():
            metadata = dict(configuration.get("metadata") or {}) | {"benchmarks_dir": str(folder)}
            task = ConfigurableTask(config=configuration | {"metadata": metadata})
            if task.get_config("num_fewshot") is None:
                task.set_config("num_fewshot", 0)
            if num_fewshot is not None and task.get_config("num_fewshot") > 0:
                task.set_config("num_fewshot", num_fewshot)
            task.set_fewshot_seed(0)
            tasks[name].append(task)
    return tasks


# ---- What the tasks' configurations call by name ---------------------------------------------------------------------

@functools.cache
def _read(source, folder):
    return SOURCES[source].read(Path(folder))


def load_documents(source, subject=None, benchmarks_dir=None, **_):
    """{split: datasets.Dataset} of a source's files; lm-eval's custom_dataset."""
    import pyarrow
    from datasets import Dataset

    if benchmarks_dir is None:
        raise ValueError(f"{source} reads local files: name their folder, with lm-eval's command line as "
                         "--metadata benchmarks_dir=FOLDER.")
    splits = _read(source, str(benchmarks_dir))
    if source in ("cmmlu", "ceval"):
        splits = _with_topics(source, splits)
    elif source == "drop":
        splits = _with_drop_prompts(splits)
    chosen = {split: [document for document in documents if subject in (None, document.get("subject"))]
              for split, documents in splits.items()}
    absent = [split for split, documents in chosen.items() if not documents]
    if absent:
        raise ValueError(f"{benchmarks_dir} has no items of {subject or source} for {', '.join(absent)}: the files of "
                         f"{source} are incomplete, fetch them again.")
    # With a fingerprint of ours: making one takes datasets longer than all the rest, and it serves its caches only.
    return {split: Dataset(pyarrow.Table.from_pylist(documents), fingerprint=f"{source}-{subject}-{split}")
            for split, documents in chosen.items()}


def _with_topics(source, splits):
    """Documents with the Chinese name of their subject."""
    topics = _topics(source)
    return {split: [document | {"topic": topics.get(document["subject"], document["subject"])}
                    for document in documents] for split, documents in splits.items()}


@functools.cache
def _topics(source):
    """{subject: its Chinese name}, out of lm-eval's descriptions, such as 以下是中国关于法学的单项选择题."""
    from lm_eval.tasks._yaml_loader import load_yaml

    found = [load_yaml(path, resolve_func=False) for path in (_lm_eval_tasks() / source).glob("*.yaml")]
    return {config["dataset_name"]: re.search("关于(.+?)的单项选择题", config["description"])[1]
            for config in found if "dataset_name" in config}


def _with_drop_prompts(splits):
    """Questions with three examples before them, and their annotators' answers, each a list of spans."""
    from lm_eval.tasks.drop.utils import get_answers

    examples, passages = [], set()
    for document in splits["train"]:
        if document["passage"] not in passages and len(passages) < 3:
            passages.add(document["passage"])
            examples.append(f"---\nPassage: {document['passage']}\nQuestion: {document['question']}\n"
                            f"Answer: {', '.join(get_answers(document)[0])}\n")
    shown = "\n".join(examples)
    return {"validation": [
        {"prompt": _DROP.format(examples=shown, passage=document["passage"], question=document["question"]),
         "query_id": document["query_id"], "answers": [list(spans) for spans in get_answers(document)]}
        for document in splits["validation"]]}


_DROP = """\
Read a passage and answer a question about it. First come some examples of passages with questions and answers.

# Examples
{examples}
# Your task
---
Passage: {passage}
Question: {question}

Think step by step, then end your response with a line of the form "Answer: $ANSWER"."""


def minerva_examples():
    """The four examples of lm-eval's minerva_math, read from its source: importing it stops at Hydra's antlr."""
    path = _lm_eval_tasks() / "minerva_math" / "utils.py"
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == "list_fewshot_samples":
            return ast.literal_eval(node.body[-1].value)
    raise ValueError(f"{path} has no list_fewshot_samples: expected lm-eval 0.4.13.")
