"""Whether answers to a problem can be verified, and how: found in this process, without workers or a sandbox."""

import re

from .code import check_tests
from .equality import check_signs
from .expressions import Unreadable
from .math import extract_final_answer, is_plain_number

# The final answer of a text stands near its end; what is searched of a long one.
_LAST_CHARS = 4000
# What tells a final answer from the words behind "the answer is": a digit, LaTeX, or a choice.
_NO_WORDS = re.compile(r"\d|\\|^[（(]?[A-J][)）.]?$|^-?[a-z]$|[一二两三四五六七八九十百千]|[√π∞∅½⅓⅔¼¾]")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}|[\u4e00-\u9fff]{2}")
_MAX_WORDS = 3  # of an answer that is no prose, such as "north west"


def verifiable_by(answer=None, tests=(), solution=None):
    """"code", "math" or None: the verifier that could judge answers to a problem.

    tests: Python programs, as of a code problem: "code" if each parses and calls something that it leaves to the
    answer, which is what CodeVerifier demands. answer: the final answer as it stands in a record, of which a marked
    part counts ("#### 18", a box); solution: a text that counts only if it marks its final answer (see math.py), and
    not for an answer in words. "math" if MathVerifier could read that answer.
    Expressions that only a computer algebra system parses are not parsed here, as it may hang: they count if all their
    signs are known and their brackets closed.
    """
    if tests:
        try:
            check_tests(tests)
        except ValueError:
            return None
        return "code"
    if answer is not None:
        if "####" in answer or len(_WORD.findall(answer)) > _MAX_WORDS:
            answer = extract_final_answer(answer[-_LAST_CHARS:])
        return "math" if answer is not None and _is_readable(answer) else None
    if solution is not None:
        marked = extract_final_answer(solution[-_LAST_CHARS:])
        if marked is not None and _NO_WORDS.search(marked) and _is_readable(marked):
            return "math"
    return None


def _is_readable(answer):
    if is_plain_number(answer):
        return True
    if not " ".join(answer.split()).isprintable():
        return False
    try:
        check_signs(answer)
    except (Unreadable, RecursionError):
        return False
    return True
