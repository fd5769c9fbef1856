"""Verifiable word problems in English and Chinese: a start value, 1 to 4 steps of + - x, one question.

Few words and small numbers (every value is in 1..99), so that a student of 0.1 M parameters can learn most of it from
2000 to 3000 problems, and a teacher nearly all of it from 60000.
"""
import argparse
import json
from typing import NamedTuple

import numpy as np
import xxhash

from mindpangu.data.documents import dress_example, to_chat

MAX_VALUE = 99
MAX_START = 50
MAX_TERM = 20  # of an addition or a subtraction
MAX_FACTOR = 5
MAX_STEPS = 4
IRRELEVANT_SHARE = 0.3
# A tenth of all chains of operations is held out: a chain met in training never returns in a test, in other words or in
# the other language.
HELDOUT_MODULUS = 10
# Random numbers for this many candidates are drawn at once. DRAWS bounds what one candidate uses; both belong to the
# seed's meaning, since they fix which candidate gets which numbers.
CHUNK = 1024
DRAWS = 12 + 3 * MAX_STEPS


class Problem(NamedTuple):
    """thoughts: a sentence per step in words; answer: the equations, one a line, then "#### n"; value: that n."""

    question: str
    thoughts: str
    answer: str
    value: str
    num_steps: int
    language: str


# {name} and its pronoun {they}, {noun}, {n} a number. All Chinese nouns are counted with 个.
WORDS = {
    "en": {
        "people": [("Tom", "He"), ("Ben", "He"), ("Sam", "He"), ("Leo", "He"),
                   ("Anna", "She"), ("Lily", "She"), ("Mia", "She"), ("Eva", "She")],
        "nouns": ["apples", "books", "cards", "coins", "eggs", "pens", "shells", "stamps"],
        "start": ["{name} has {n} {noun}.", "{name} starts with {n} {noun}.", "{name} counts {n} {noun}.",
                  "There are {n} {noun} in the bag of {name}."],
        "+": ["{they} buys {n} more.", "{they} finds {n} more.", "{they} gets {n} more.", "Then {n} more are put in.",
              "A friend brings {n} more."],
        "-": ["{they} gives away {n}.", "{they} loses {n}.", "{they} sells {n}.", "Then {n} are taken out.",
              "A friend borrows {n}."],
        "*": ["The number is multiplied by {n}.", "Soon there are {n} times as many.",
              "Then it grows to {n} times that."],
        "question": ["How many {noun} are there now?", "How many {noun} does {name} have in the end?",
                     "What is the number of {noun} now?"],
        "irrelevant": ["It is a sunny day.", "The bag is red.", "{they} is {n} years old."],
        "thoughts": {"start": "There are {n} at first.", "+": "Adding {n} to {before} gives {after}.",
                     "-": "Taking {n} from {before} leaves {after}.", "*": "{before} times {n} gives {after}."},
        "space": " ",
    },
    "zh": {
        "people": [("小明", "他"), ("小刚", "他"), ("小军", "他"), ("小强", "他"),
                   ("小红", "她"), ("小丽", "她"), ("小美", "她"), ("小芳", "她")],
        "nouns": ["苹果", "鸡蛋", "杯子", "盒子", "橘子", "气球", "贝壳", "书包"],
        "start": ["{name}有{n}个{noun}。", "{name}开始有{n}个{noun}。", "{name}数了数，有{n}个{noun}。",
                  "{name}的袋子里有{n}个{noun}。"],
        "+": ["{they}又买了{n}个。", "{they}又找到{n}个。", "{they}又得到{n}个。", "然后又放进{n}个。",
              "朋友又带来{n}个。"],
        "-": ["{they}送出{n}个。", "{they}丢了{n}个。", "{they}卖掉{n}个。", "然后拿走{n}个。", "朋友借走{n}个。"],
        "*": ["个数乘以{n}。", "很快变成原来的{n}倍。", "然后增加到{n}倍。"],
        "question": ["现在有多少个{noun}？", "最后{name}有多少个{noun}？", "现在{noun}的个数是多少？"],
        "irrelevant": ["今天天气很好。", "袋子是红色的。", "{they}今年{n}岁。"],
        "thoughts": {"start": "开始有{n}个。", "+": "{before}加{n}得{after}。", "-": "{before}减{n}得{after}。",
                     "*": "{before}乘{n}得{after}。"},
        "space": "",
    },
}


def make_problems(num_problems, seed, split="train", language="both"):
    """Generate num_problems different problems (no question twice).

    The same seed gives the same problems, and fewer of them are the beginning of more. split: "train" or "heldout";
    no chain of operations is in both, whatever the seeds. language: "en", "zh" or "both" in equal shares.
    Raises ValueError for a num_problems below 1 or an unknown split or language.
    """
    if num_problems < 1:
        raise ValueError(f"num_problems={num_problems}: expected at least 1.")
    if split not in ("train", "heldout"):
        raise ValueError(f"split={split!r} is unknown: choose 'train' or 'heldout'.")
    if language not in ("both", *WORDS):
        raise ValueError(f"language={language!r} is unknown: choose 'both', 'en' or 'zh'.")
    languages = list(WORDS) if language == "both" else [language]
    generator = np.random.Generator(np.random.Philox(seed))
    problems, questions = [], set()
    while True:
        for draws in generator.random((CHUNK, DRAWS)).tolist():
            next_draw = iter(draws).__next__
            chosen_language = _choose(languages, next_draw)
            start, steps = _draw_chain(next_draw)
            if is_heldout(start, steps) != (split == "heldout"):
                continue
            problem = _write_problem(chosen_language, start, steps, next_draw)
            if problem.question in questions:
                continue
            questions.add(problem.question)
            problems.append(problem)
            if len(problems) == num_problems:
                return problems


def to_example(problem, dress):
    """The problem as a chat; dress: "reasoning", "fast" or "result", see documents.dress_example."""
    return dress_example(problem.question, problem.thoughts, problem.answer, problem.value, dress)


def is_heldout(start, steps):
    """Whether a chain of operations belongs to the held-out split. steps: a list of (operator, number)."""
    chain = str(start) + "".join(f"{operator}{number}" for operator, number in steps)
    return xxhash.xxh3_64_intdigest(chain.encode()) % HELDOUT_MODULUS == 0


def _choose(options, next_draw):
    return options[int(next_draw() * len(options))]


def _draw_chain(next_draw):
    value = start = 2 + int(next_draw() * (MAX_START - 1))
    steps = []
    for _ in range(1 + int(next_draw() * MAX_STEPS)):
        # The largest number each operator may take now, so that the value stays within 1..MAX_VALUE.
        largest = {"+": min(MAX_TERM, MAX_VALUE - value), "-": min(MAX_TERM, value - 1),
                   "*": min(MAX_FACTOR, MAX_VALUE // value)}
        smallest = {"+": 1, "-": 1, "*": 2}
        operator = _choose([name for name in largest if largest[name] >= smallest[name]], next_draw)
        number = smallest[operator] + int(next_draw() * (largest[operator] - smallest[operator] + 1))
        steps.append((operator, number))
        value = apply_step(value, operator, number)
    return start, steps


def apply_step(value, operator, number):
    return {"+": value + number, "-": value - number, "*": value * number}[operator]


def _write_problem(language, start, steps, next_draw):
    words = WORDS[language]
    name, they = _choose(words["people"], next_draw)
    noun = _choose(words["nouns"], next_draw)

    def sentence(kind, number=None):
        return _choose(words[kind], next_draw).format(name=name, they=they, noun=noun, n=number)

    value = start
    sentences = [sentence("start", start)]
    thoughts = [words["thoughts"]["start"].format(n=start)]
    equations = []
    for operator, number in steps:
        after = apply_step(value, operator, number)
        sentences.append(sentence(operator, number))
        thoughts.append(words["thoughts"][operator].format(n=number, before=value, after=after))
        equations.append(f"{value}{operator}{number}={after}")
        value = after
    if next_draw() < IRRELEVANT_SHARE:
        position = 1 + int(next_draw() * len(sentences))
        sentences.insert(position, sentence("irrelevant", 5 + int(next_draw() * 10)))
    sentences.append(sentence("question"))
    # A line per equation: "\n" is one token, "; " would be two, since the tokenizer never joins a space to a digit.
    answer = "\n".join([*equations, f"#### {value}"])
    space = words["space"]
    return Problem(space.join(sentences), space.join(thoughts), answer, str(value), len(steps), language)


def main():
    """Write problems as a file of chats, the form that data=chats reads."""
    parser = argparse.ArgumentParser(prog="python -m mindpangu.data.arithmetic", description=main.__doc__)
    parser.add_argument("file", help="the JSONL file to write")
    parser.add_argument("--num-problems", type=int, default=2000, help="how many (2000)")
    parser.add_argument("--seed", type=int, default=0, help="other seeds, other problems (0)")
    parser.add_argument("--split", choices=("train", "heldout"), default="train", help="disjoint by construction")
    parser.add_argument("--language", choices=("both", *WORDS), default="both")
    arguments = parser.parse_args()
    try:
        problems = make_problems(arguments.num_problems, arguments.seed, arguments.split, arguments.language)
        with open(arguments.file, "w", encoding="utf-8") as file:
            for problem in problems:
                file.write(json.dumps(to_chat(to_example(problem, "reasoning")), ensure_ascii=False) + "\n")
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{arguments.file}: {len(problems)} problems")


if __name__ == "__main__":
    main()
