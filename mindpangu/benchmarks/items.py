"""The items of the published benchmark files as text that is not to be trained on."""

from mindpangu.data.decontaminate import Item

from .files import SOURCES, missing_patterns

# Of each benchmark: the split that is scored, and the fields of its documents that make the question.
_QUESTIONS = {
    "mmlu": ("test", ("question",)),
    "cmmlu": ("test", ("Question",)),
    "ceval": ("val", ("question",)),
    "ifeval": ("train", ("prompt",)),
    "cluewsc": ("test", ("text",)),
    "gsm8k": ("test", ("question",)),
    "math500": ("test", ("problem",)),
    "math": ("test", ("problem",)),
    "drop": ("validation", ("question",)),  # the passages are Wikipedia's
    "gpqa_diamond": ("test", ("question",)),
    "mbpp": ("test", ("text",)),
    "mbpp_sanitized": ("test", ("text",)),
    "humaneval": ("test", ("prompt",)),
    "bbh": ("test", ("input",)),
    "hellaswag": ("validation", ("ctx_a", "ctx_b")),
    "winogrande": ("validation", ("sentence",)),
}


def list_items(folder):
    """(list of Item, {benchmark: number of its items}) of all benchmarks whose files are in a folder.

    An item's name is its split and place there, from 0. Questions without text are left out. Raises ValueError if there
    is no benchmark's file, and for a file that is not as published.
    """
    items, counts = [], {}
    for name, source in SOURCES.items():
        if missing_patterns(source, folder):
            continue
        split, fields = _QUESTIONS[name]
        texts = [" ".join(document[field] for field in fields).strip() for document in source.read(folder)[split]]
        found = [Item(name, f"{split} {number}", text) for number, text in enumerate(texts) if text]
        items += found
        counts[name] = len(found)
    if not items:
        raise ValueError(f"{folder}: no benchmark's files: expected some of {', '.join(SOURCES)}; python -m "
                         "mindpangu.evaluate --list-tasks names their places.")
    return items, counts
