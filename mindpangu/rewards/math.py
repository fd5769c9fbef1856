r"""Grading of final answers to problems of mathematics.

Which answer counts: three kinds of markers are known, a line "#### 18", a box \boxed{18} or \fbox{18}, and a phrase
such as "the answer is 18", 答案：18, 故选 B, 答：18个. The last "####" line counts; without one the last box; without
one the last phrase; without any, a line or a phrase in words ("the answer is east"). Boxes with nothing but "and",
"or", 和, 或 or a comma between them are one answer of several parts.
"""

import itertools
import re
from fractions import Fraction

from .equality import MAX_LENGTH, check_readable, same_answer
from .expressions import Unreadable
from .score import Score
from .workers import WorkerPool

# Longer than any number worth grading, and short enough that turning it into an integer costs nothing.
MAX_ANSWER_LENGTH = 200


class MathVerifier:
    """Whether a response's final answer is the problem's value. Threads may share one.

    timeout_s: wall-clock limit of one answer; num_workers: processes that check side by side. To be closed.
    """

    def __init__(self, num_workers=2, timeout_s=5.0):
        self._pool = WorkerPool("mindpangu.rewards.math:check_pair", num_workers, timeout_s)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self._pool.close()

    def check(self, problem):
        """Raises ValueError for a problem without a value, or with one that no other answer could be compared with."""
        if problem.value is None:
            raise ValueError("the answer is missing: a problem of mathematics needs the value to compare with.")
        if _plain_number(problem.value) is None:
            try:
                reason = self._pool.call(problem.value, None)
            except (TimeoutError, RuntimeError) as error:
                reason = str(error)
            if reason:
                raise ValueError(f"answer={problem.value!r} can't be read ({reason}): expected a final answer such as "
                                 r"18, \frac{1}{2}, (1, 2], x = 5 or B.")

    def score(self, problem, response):
        """1 or 0. Reasons: correct, wrong_answer, no_answer, timeout, error (a worker died)."""
        answer = extract_final_answer(response.content)
        if answer is None:
            return _graded(False, "no_answer")
        numbers = _plain_number(problem.value), _plain_number(answer)
        if None not in numbers:
            return _graded(numbers[0] == numbers[1])
        try:
            return _graded(self._pool.call(problem.value, answer))
        except TimeoutError:
            return _graded(False, "timeout")
        except (RuntimeError, OSError):
            return _graded(False, "error")


def _graded(is_correct, reason=None):
    value = float(is_correct)
    return Score(value, {"correct": value}, reason or ("correct" if is_correct else "wrong_answer"))


def check_pair(gold, answer):
    """What the workers run: whether an answer says what gold says; without an answer, why gold can't be read, if so."""
    if answer is not None:
        return same_answer(gold, answer)
    try:
        check_readable(gold)
    except Unreadable as error:
        return str(error)
    return None


_PLAIN_NUMBER = re.compile(r"([-+]?)(\d{1,3}(?:,\d{3})+|\d+)?(\.\d+)?(?:/(\d+))?")


def is_plain_number(text):
    """Whether it is a number without unit and markup."""
    return _match_number(text) is not None


def _match_number(text):
    text = text.strip().removesuffix(".")
    match = _PLAIN_NUMBER.fullmatch(text) if len(text) <= MAX_ANSWER_LENGTH else None
    return match if match and (match[2] or match[3]) and int(match[4] or "1") else None


def _plain_number(text):
    """The exact value of a number without unit and markup; None of anything else."""
    match = _match_number(text)
    if match is None:
        return None
    number = Fraction(f"{(match[2] or '0').replace(',', '')}{match[3] or ''}") / int(match[4] or "1")
    return -number if match[1] == "-" else number


# ---- Which answer counts ---------------------------------------------------------------------------------------------

def extract_final_answer(text):
    """The final answer as written (see the top of this file), or None."""
    if "####" in text:  # most problems with a worked answer: found without looking for the other markers
        lines = _half_width(text)
        for line in reversed(_FINAL_LINE.findall(lines, lines.find("####"))):
            if _starts_answer(line, _LINE):
                return line.strip()
    answers = _final_answers(text)
    return min(answers, key=lambda answer: (answer[2], -answer[0]))[3] if answers else None


def count_final_answers(text):
    """How many final answers a text marks; markers of several kinds around the same answer count once."""
    count, last_end = 0, -1
    for start, end, _, _ in sorted(_final_answers(text)):
        if start >= last_end:
            count += 1
        last_end = max(last_end, end)
    return count


_LINE, _BOX, _PHRASE = range(3)
_HALF_WIDTH = {code: code - 0xFEE0 for code in range(0xFF10, 0xFF5B) if chr(code).isalnum()}  # Ｂ, ８
# Every repetition is bounded, so that any text is searched in linear time.
_FINAL_LINE = re.compile(r"(?<!#)####(?!#)([^\n]*)")
_BOX_OR_BRACE = re.compile(r"\\f?box(?:ed)?[ \t]{0,9}\{|\\.|[{}]", re.DOTALL)
_ASSIGNED = r"(?:[A-Za-z](?:_\{?\d\}?)?\s{0,5}=\s{0,5})"
_BEFORE_BOX = re.compile(_ASSIGNED + r"\Z")
_BETWEEN_BOXES = re.compile(rf"[\s$,;，；、]{{1,20}}(?:(?:and|or|和|或|与|及)[\s$]{{0,20}})?{_ASSIGNED}?[\s$]{{0,5}}"
                            rf"|\s{{0,9}}[和或与及]\s{{0,9}}{_ASSIGNED}?")
_LINK = r"[ \t*]{0,9}[：:=]?[ \t*]{0,9}\n{0,2}"
_KEYWORD = re.compile("|".join((
    r"(?<![A-Za-z])(?:[Aa]nswer|ANSWER|[Cc]orrect (?:option|choice))(?![A-Za-z])"
    r"(?: to (?:the|this) (?:question|problem))?"
    r"(?: (?:is|are|should be|must be)(?: therefore| thus| then)?(?: option| choice)?)?" + _LINK,
    r"答案(?:应该|应当|应)?(?:是|为|等于|选)?" + _LINK,
    # 答：一共有18个 from its number on.
    r"(?<![回解问])答[：:][ \t]{0,9}(?:[\u4e00-\u9fff]{0,20} ?(?=[-\d$\\])|(?=[A-J](?![A-Za-z]))"
    r"|[\u4e00-\u9fff]{0,20}?(?=[一二两三四五六七八九十百千]{1,9}[个只条本张支元米天人岁倍]))",
    r"(?<![不没挑筛])选择?[：:]?[ \t]{0,9}(?=[（(]?[A-J]{1,9}(?![A-Za-z]))")))
_KEYWORD_SIGNS = ("nswer", "NSWER", "orrect ", "答", "选")  # one of them is in every keyword, and soon found
_LINKED = re.compile(r"(?:is|are|be|therefore|thus|then|是|为|等于|[：:=])[ \t*]{0,9}\n{0,2}\Z")
_STARTS_ANSWER = re.compile(
    r"[ \t$*¥￥€£+−-]{0,20}(?:\\[(\[])?[ \t$*¥￥€£+−-]{0,20}(?:[\d\\(\[{|√π∞∅½⅓⅔¼¾（【]|\.\d|负\d"
    r"|负?[零一二两三四五六七八九十百千]"
    r"|[A-Za-z](?![A-Za-z])(?! [A-Za-z]{2})|[A-J]{2,9}(?![A-Za-z])|(?:sqrt|sin|cos|tan|log|ln|pi)(?![a-z]))")
_HEADING = re.compile(r"[ \t]{0,9}\d{1,2}[.)、．][ \t]{0,9}[^\W\d_]")  # "#### 3. Simplify"
_SENTENCE_TOKEN = re.compile(
    r"(?P<toggle>\$)|(?P<open>\\[(\[]|[(\[{（【])|(?P<close>\\[)\]]|[)\]}）】])|\\."
    r"|(?P<end>[\n。！]|．(?!\d)|[.!](?=\s|\Z)"
    r"|[,;，；](?=\s?(?!and|or)(?:[A-Za-z]{2}|[\u4e00-\u9fff])(?<![和或与及]))"
    r"| (?=(?:because|since|as|so|which|where|for|when) ))", re.DOTALL)


def _final_answers(text):
    """[(start, end, kind, answer)]. An answer in words, such as "the answer is east", is one if there is no other."""
    text = _half_width(text)
    lines = [(*match.span(), _LINE, match[1]) for match in _FINAL_LINE.finditer(text)]
    phrases, linked = [], set()
    has_keyword = any(sign in text for sign in _KEYWORD_SIGNS)
    keywords = [match.span() for match in _KEYWORD.finditer(text)] if has_keyword else []
    for (begin, start), (limit, _) in itertools.pairwise([*keywords, (len(text), None)]):
        if start < limit:
            end = _sentence_end(text, start, min(start + MAX_LENGTH + 1, limit))
            phrases.append((begin, end, _PHRASE, text[start:end]))
            if _LINKED.search(text, begin, start):
                linked.add(begin)
    answers = _boxes(text)
    answers += [found for found in lines + phrases
                if _starts_answer(found[3], found[2])]
    answers = answers or [found for found in lines + phrases
                          if found[3].strip() and (found[2] == _LINE or found[0] in linked)]
    return [(start, end, kind, answer.strip()) for start, end, kind, answer in answers]


def _starts_answer(text, kind):
    return bool(_STARTS_ANSWER.match(text)) and not (kind == _LINE and _HEADING.match(text))


def _half_width(text):
    return text if text.isascii() else text.translate(_HALF_WIDTH)


def _boxes(text):
    first = re.search(r"\\f?box", text)
    opened, boxes = [], []
    for match in _BOX_OR_BRACE.finditer(text, first.start()) if first else ():
        if match[0].endswith("{") and match[0] != r"\{":
            opened.append(match)
        elif match[0] == "}" and opened:
            begin = opened.pop()
            if begin[0] != "{":
                # Boxes inside of this one were closed before it.
                while boxes and boxes[-1][0] > begin.start():
                    boxes.pop()
                boxes.append((begin.start(), match.end(), begin.end(), match.start()))
    runs = []
    for start, end, inner_start, inner_end in boxes:
        if runs and start - runs[-1][1] <= 60 and _BETWEEN_BOXES.fullmatch(text, runs[-1][1], start):
            first = runs[-1][0]
            # The first of several boxes begins with its "x =".
            before = _BEFORE_BOX.search(text, max(0, first - 20), first)
            first = before.start() if before else first
            runs[-1] = (first, end, _BOX, text[first:end])
        else:
            runs.append((start, end, _BOX, text[inner_start:inner_end]))
    return runs


def _sentence_end(text, start, limit):
    """Where the answer that begins at start ends: with its sentence or clause, not within mathematics or brackets."""
    depth, in_math = 0, False
    for match in _SENTENCE_TOKEN.finditer(text, start, limit):
        if match["toggle"]:
            in_math = not in_math
        elif match["open"]:
            depth += 1
        elif match["close"]:
            depth -= 1
            if depth < 0:
                return match.start()
        elif match["end"] and depth == 0 and not in_math:
            return match.start()
    return limit
