"""Graders of benchmark answers: filters that lm-eval calls by name with all answers of a task at once.

Each takes (list of the answers to each document, documents) and returns a Score for every document, of its first
answer. The value is the share that is right; reasons are among "correct", "wrong_answer", "no_answer", and those of the
verifiers in mindpangu.rewards.
"""

import re
from concurrent.futures import ThreadPoolExecutor

from ..data.documents import Example
from ..rewards.score import Response, Score

# lm-eval hands a grader documents and answers only; the verifiers with their worker processes are set by `use`.
_rewards = None


def use(rewards):
    """The Rewards whose verifiers grade from now on; it stays the caller's to close."""
    global _rewards
    _rewards = rewards


def results(document, graded):
    """lm-eval's process_results of every task that is graded here."""
    return {"score": graded[0].value}


# ---- Choices ---------------------------------------------------------------------------------------------------------

# OpenCompass's pattern for the line that the prompt asks for.
_ANSWER_LINE = re.compile(r"(?i)ANSWER\s*:\s*([A-D])")
# Its Chinese one, which takes the half-width colon of its prompt only; here also the full-width one that models write.
_ANSWER_LINE_ZH = re.compile(r"答案\s*[:：]\s*[\W_]*([A-D])")
# Where no form was asked for: a letter that is said to be the answer, else a letter that stands alone.
_STATED_LETTER = (
    re.compile(r"(?:答案|选项|(?i:answer))\s*(?:应该|应当|应)?(?:是|为|选|[Ii]s|[:：])*\s*[\W_]*(?:选项)?\s*([A-D])(?![A-Za-z])"),
    re.compile(r"(?:选择?|故选|应选)\s*[\W_]*([A-D])(?![A-Za-z])"),
    re.compile(r"(?<![A-Za-z])([A-D])\s*(?:选?项)?\s*(?:是)?正确"),
    re.compile(r"(?<![A-Za-z])([A-D])(?![A-Za-z])"),
)


def _grade_letters(answers, documents, find, right_letter):
    graded = []
    for [answer, *_], document in zip(answers, documents, strict=True):
        letter = find(answer)
        correct = letter == right_letter(document)
        graded.append(Score(float(correct), {}, "correct" if correct else "wrong_answer" if letter else "no_answer"))
    return graded


def _first_group(*patterns):
    """The letter that the first of the patterns to match finds, at its first match; None if none matches."""
    return lambda text: next((match[1] for match in (p.search(text) for p in patterns) if match), None)


def grade_answer_line(answers, documents):
    return _grade_letters(answers, documents, lambda text: (_first_group(_ANSWER_LINE)(text) or "").upper(),
                          lambda document: "ABCD"[document["answer"]])


def grade_answer_line_zh(answers, documents):
    return _grade_letters(answers, documents, _first_group(_ANSWER_LINE_ZH), lambda document: document["Answer"])


def grade_stated_letter(answers, documents):
    return _grade_letters(answers, documents, _first_group(*_STATED_LETTER), lambda document: document["answer"])


def grade_first_capital(answers, documents):
    """The first capital letter of any kind, as in OpenCompass: "B. 否" and "Answer: A" are B and A(nswer)."""
    return _grade_letters(answers, documents, lambda text: next((c for c in text if c.isupper()), None),
                          lambda document: "BA"[document["label"]])


# ---- Mathematics, spans of text --------------------------------------------------------------------------------------

def _side_by_side(function, items):
    with ThreadPoolExecutor(_rewards.config.num_workers) as threads:
        return list(threads.map(function, items))


def grade_mathematics(answers, documents):
    """The final answer by mindpangu.rewards.math. Answers of GSM8K stand behind "####"."""
    verifier = _rewards.verifier("math")

    def grade(pair):
        [answer, *_], document = pair
        gold = document["answer"].split("####")[-1].strip()
        return verifier.score(Example((), gold, task_type="math"), Response(answer))

    return _side_by_side(grade, list(zip(answers, documents, strict=True)))


_ANSWER_TEXT = re.compile(r"(?i)answer\s*:\s*([^\n]+)")


def grade_spans(answers, documents):
    """DROP's F1 with the best of the annotators' answers (Dua et al. 2019, arXiv:1903.00161, section 5)."""
    from lm_eval.tasks.drop.utils import process_results

    graded = []
    for [answer, *_], document in zip(answers, documents, strict=True):
        found = _ANSWER_TEXT.search(answer)
        spans = {"answers": [tuple(spans) for spans in document["answers"]]}
        score = process_results(spans, [found[1].strip() if found else answer])
        reason = "correct" if score["em"] else "partly_right" if score["f1"] else "wrong_answer"
        graded.append(Score(float(score["f1"]), {"exact_match": float(score["em"])}, reason if found or score["f1"]
                            else "no_answer"))
    return graded


# ---- Code ------------------------------------------------------------------------------------------------------------

_BLOCK = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)


def first_block(text):
    """The first fenced block, which a truncated answer may have left open; without any, the text between the marks
    [BEGIN] and [DONE], where there are some."""
    block = _BLOCK.search(text)
    if block:
        return block[1]
    return text.split("[BEGIN]")[-1].split("[DONE]")[0].strip("\n")


def _grade_programs(answers, documents, program_of, tests_of):
    """pass@1: 1 if all tests pass."""
    verifier = _rewards.verifier("code")

    def grade(pair):
        [answer, *_], document = pair
        score = verifier.run_tests(program_of(document, answer), tests_of(document))
        return score._replace(value=float(score.value == 1.0))

    return _side_by_side(grade, list(zip(answers, documents, strict=True)))


def grade_mbpp(answers, documents):
    return _grade_programs(answers, documents, lambda document, answer: first_block(answer),
                           lambda document: document["tests"])


def _humaneval_tests(document):
    return [f"{document['test']}\ncheck({document['entry_point']})"]


def grade_humaneval(answers, documents):
    """The answer's code behind the problem's, as in simple-evals: imports and helpers of the problem are there."""
    return _grade_programs(answers, documents, lambda document, answer: f"{document['prompt']}\n{first_block(answer)}",
                           _humaneval_tests)


def grade_completion(answers, documents):
    """The answer goes on where the problem's text ends."""
    return _grade_programs(answers, documents, lambda document, answer: document["prompt"] + answer, _humaneval_tests)
