"""Exact grading of numeric answers: 1.0 for the right final number, else 0.0."""
import re
from fractions import Fraction

SIGNS_AND_CURRENCIES = r"[-+−$¥￥€£\\*]*"  # with LaTeX's backslash and Markdown's bold
# In each pattern neighbouring repetitions share no character, so that matching takes linear time on any input.
FINAL_LINE = re.compile(rf"####[ \t]*({SIGNS_AND_CURRENCIES}\.?\d[^\n]*)")
FINAL_PHRASE = re.compile(
    rf"(?:答案(?:是|为)?|[Aa]nswer(?: is)?)[：:]?[ \t]*({SIGNS_AND_CURRENCIES}\.?\d[^\n。；，;！]*)"
)
END_OF_SENTENCE = re.compile(r"[.,!] ")
NUMBER = re.compile(r"([-+]?)(\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(\.\d+)?(/\d+)?(.*)", re.DOTALL)
FRACTION = re.compile(r"\\[dt]?frac\{(-?\d+)\}\{(\d+)\}")
# Spaces stay: "3 4" is two numbers.
MARKUP = re.compile(r"\\text\{|\\[!,]|\*\*|[\\$¥￥€£{}]")
# Longer than any number worth grading, and short enough that turning it into an integer costs nothing.
MAX_ANSWER_LENGTH = 200


def score(value, response_text):
    """1.0 if the final answer of response_text is the number value, else 0.0 (also if there is none, or two).

    Compared as exact numbers: commas, currencies, %, units and a trailing full stop do not count, 1/2 equals 0.5.
    Raises ValueError if value itself is not a number.
    """
    expected = parse_number(value)
    if expected is None:
        raise ValueError(f"value={value!r}: expected a number to compare with.")
    answer = extract_final_answer(response_text)
    return float(answer is not None and parse_number(answer) == expected)


def extract_final_answer(text):
    """The final answer as written: the last "#### n", else the last \\boxed{...}, else the last phrase.

    A phrase is "答案：n" or "answer is n". None if there is none; an unclosed \\boxed{ is none.
    """
    final_lines = FINAL_LINE.findall(text)
    if final_lines:
        return final_lines[-1].strip()
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    phrases = FINAL_PHRASE.findall(text)
    return END_OF_SENTENCE.split(phrases[-1])[0].strip() if phrases else None


def parse_number(text):
    """The one number in text as a Fraction; None if it is no number, or if more numbers or operators follow."""
    if len(text) > MAX_ANSWER_LENGTH:
        return None
    text = FRACTION.sub(r"\1/\2", text.replace("−", "-").replace("{,}", ","))
    text = MARKUP.sub("", text).strip()
    sign, whole, decimals, denominator, unit = NUMBER.fullmatch(text).groups()
    if not (whole or decimals) or re.search(r"[-+*/^=<>_]", unit) or any(character.isnumeric() for character in unit):
        return None
    if denominator and not int(denominator[1:]):
        return None
    number = Fraction(f"{(whole or '0').replace(',', '')}{decimals or ''}") / int((denominator or "/1")[1:])
    return -number if sign == "-" else number


def _last_boxed(text):
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for position in range(start + len("\\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : position]
    return None
