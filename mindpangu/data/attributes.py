"""Attributes of documents: what rules say of them, how hard and how good they are, and the filter on them.

A document's record may be a chat ({"messages"}), a problem in GSM8K form ({"question", "answer"}) or bare ({"prompt",
"answer" or "tests"}), a program with tests ({"text", "code", "test_list"}), an instruction ({"instruction", "input",
"output"}), or plain text.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

import xxhash

from ..rewards.repetition import line_repetition, repeated_ngrams, split_words
from ..rewards.verifiable import verifiable_by
from .documents import ANNOTATION
from .words import normalise

PASS_RATES = "pass_rates.jsonl"  # of a run folder
_MAX_BARE_CHARS = 200  # of an answer that is no worked solution
_PROMPT_CHARS = 4000  # of a prompt that rules look at: what is asked stands at its start or its end


class Attributes(NamedTuple):
    """What is known of a document. None: unknown, or nothing to be said."""

    subcategory: str | None  # one of config.SUBCATEGORIES
    question_type: str | None  # one of config.QUESTION_TYPES
    verifiable: str | None  # math | code: the verifier that could judge answers to it
    hops: int | None  # steps of inference in its solution, see `count_hops`
    language: str  # ISO 639-1, und
    num_chars: int
    num_words: int  # a Chinese character is one
    ngram_repetition: float  # share of the 10-grams of words that stood before in it, 0 to 1
    line_repetition: float  # share of the lines
    faults: tuple[str, ...]  # of its form, some of config.FAULTS, see `find_faults`
    answer_chars: int  # of the last reply with its thoughts; 0 without one
    complexity: float | None = None  # 1 - pass rate of the student
    rating: int | None = None  # 1 (useless) to 5, a model's
    model_error: str | None = None  # why a model's annotation could not be used, where one was asked for


def to_json(attributes):
    """The JSON object of Attributes."""
    return attributes._asdict() | {"faults": list(attributes.faults)}


def from_json(fields):
    """The Attributes of a JSON object. Raises ValueError for missing or unknown fields."""
    try:
        return Attributes(**fields | {"faults": tuple(fields["faults"])})
    except (KeyError, TypeError) as error:
        raise ValueError(f"attributes={str(fields):.200}: expected {', '.join(Attributes._fields)} ({error}): annotate "
                         "the documents again.") from None


# ---- Rules -----------------------------------------------------------------------------------------------------------

class Parts(NamedTuple):
    """A record taken apart."""

    prompt: str  # all that stands before the last reply; "" for plain text
    solution: str  # thoughts and content of the last reply; "" without one, or where it is a bare answer
    answer: str | None  # the final answer that the record states
    tests: tuple[str, ...]
    is_program: bool  # the solution is a program


def annotate_by_rules(documents):
    """Attributes of Documents, each by itself.

    Subcategory and question type come from words and forms of the prompt, English and Chinese: what they do not know is
    None, and a prompt of no other type is open. Verifiable: see rewards/verifiable.py.
    """
    return [_annotate(document) for document in documents]


def _annotate(document):
    text, parts = document.text, split_record(document.record)
    verifiable = verifiable_by(parts.answer, parts.tests, parts.solution if parts.prompt else None)
    prompt = parts.prompt
    if len(prompt) > _PROMPT_CHARS:
        prompt = f"{prompt[:_PROMPT_CHARS // 2]}\n{prompt[-_PROMPT_CHARS // 2:]}"
    words = split_words(text)
    return Attributes(
        subcategory=find_subcategory(prompt or text[:_PROMPT_CHARS], verifiable, bool(parts.tests)),
        question_type=find_question_type(prompt, bool(parts.tests)) if prompt.strip() else None,
        verifiable=verifiable,
        hops=None if parts.is_program else count_hops(parts.solution),
        language=document.language, num_chars=len(text), num_words=len(words),
        ngram_repetition=round(repeated_ngrams(words), 4), line_repetition=round(line_repetition(text), 4),
        faults=find_faults(text, "" if parts.is_program else parts.solution if prompt else text),
        answer_chars=len(parts.solution or parts.answer or ""))


def split_record(record):
    """The Parts of a Document's record. One of an unknown form, or with values of other types, is plain text."""
    get = record.get
    tests = get("tests") or get("test_list") or ()
    tests = tuple(test for test in tests if isinstance(test, str)) if isinstance(tests, list) else ()
    messages = get("messages")
    if isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages):
        return _split_chat(messages, get("value", get("answer")), tests)
    for key in ("question", "prompt", "problem"):
        if isinstance(get(key), str):
            answer, solution = _string(get("answer", get("value"))), _string(get("solution")) or ""
            # A worked answer is a solution, too; a bare one is not.
            if not solution and answer and ("\n" in answer or "####" in answer or len(answer) > _MAX_BARE_CHARS):
                solution = answer
            return Parts(get(key), solution, answer, tests, is_program=bool(tests))
    if isinstance(get("instruction"), str) and isinstance(get("output"), str):
        prompt = join_prompt(part for part in (get("instruction"), _string(get("input"))) if part)
        return Parts(prompt, get("output"), None, tests, False)
    if tests and isinstance(get("text"), str):
        return Parts(get("text"), _string(get("code")) or "", None, tests, is_program=True)
    return Parts("", "", None, (), False)


def _split_chat(messages, value, tests):
    replies = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
    last = replies[-1] if replies else len(messages)
    prompt = join_prompt(_string(message.get("content")) or "" for message in messages[:last])
    solution = ""
    if replies:
        parts = (messages[last].get("reasoning_content"), messages[last].get("content"))
        solution = "\n".join(part for part in map(_string, parts) if part)
    return Parts(prompt, solution, _string(value), tests, False)


def _string(value):
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) else None


def _stretches(text):
    """(ASCII, others) of stretches with | between them: most prompts can hold the first only."""
    stretches = text.split("|")
    return (tuple(stretch for stretch in stretches if stretch.isascii()),
            tuple(stretch for stretch in stretches if not stretch.isascii()))


# (subcategory, English words, stretches of text): a prompt is of the first of which it holds any, in lower case.
_TOPICS = (
    ("code",
     "python javascript typescript html css sql regex cpp golang java kotlin rust bash dockerfile numpy pandas api "
     "json algorithm pseudocode debug",
     "```|write a function|write a program|write a script|write code|source code|def |c++|c#|#include|"
     "代码|编程|程序|算法|函数实现|脚本"),
    ("translation", "translate translation", "翻译|译成|译为|英译|中译"),
    ("writing",
     "rewrite rephrase paraphrase summarize summarise proofread poem essay haiku story lyrics slogan headline email "
     "letter blog resume limerick",
     "作文|写一|写首|写篇|改写|润色|缩写|续写|总结以下|概括|诗歌|故事|邮件"),
    ("geometry",
     "triangle triangles circle circles angle angles polygon rectangle rectangular square perimeter radius diameter "
     "parallelogram trapezoid hypotenuse sphere cylinder cone prism pyramid circumference parabola ellipse hyperbola "
     "vertices quadrilateral hexagon tangent collinear perpendicular",
     "三角形|圆的|圆心|圆形|角度|矩形|长方形|正方形|周长|半径|直径|梯形|平行四边形|椭圆|抛物线|双曲线|几何|面积|体积"),
    ("calculus", "derivative integral integrate differentiate antiderivative differentiable",
     "\\int|\\lim|导数|积分|极限|微分|求导"),
    ("probability", "probability probabilities permutations combinations dice expected random arrangements variance",
     "how many ways|how many different|\\binom|概率|排列|组合|期望|方差|多少种"),
    ("number_theory",
     "prime primes divisor divisors divisible remainder modulo gcd lcm congruent digits coprime multiples",
     "\\pmod|质数|素数|整除|余数|最大公约数|最小公倍数|同余|因数"),
    ("algebra",
     "equation equations polynomial polynomials inequality quadratic logarithm matrix matrices vector vectors roots "
     "factorise factorize simplify asymptote",
     "solve for|\\sqrt|\\log|f(x)|方程|多项式|不等式|矩阵|向量|数列|函数|因式"),
    ("science",
     "physics chemistry biology molecule molecules electron atom atoms velocity acceleration enzyme protein dna "
     "photosynthesis thermodynamics voltage species",
     "物理|化学|生物|分子|原子|电压|加速度|细胞|蛋白质"))
_TOPIC_OF_WORD = {word: i for i, (_, words, _) in reversed(list(enumerate(_TOPICS))) for word in words.split()}
_TOPIC_WORDS = frozenset(_TOPIC_OF_WORD)
_TOPIC_STRETCHES = [(stretch, i) for i, (_, _, stretches) in enumerate(_TOPICS) for stretch in stretches.split("|")]
_ASCII_TOPIC_STRETCHES = [(stretch, i) for stretch, i in _TOPIC_STRETCHES if stretch.isascii()]
_NO_MATHS = {i for i, (topic, _, _) in enumerate(_TOPICS) if topic in ("translation", "writing")}
_NUMBERS = frozenset("two three four five six seven eight nine ten eleven twelve twenty thirty fifty hundred thousand "
                     "half twice double triple dozen".split())
_CHINESE_NUMBERS = re.compile("[一二两三四五六七八九十百千万半]")
_DIGIT, _TWO_NUMBERS = re.compile(r"\d"), re.compile(r"\d\D+\d")
_PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~，。？！；：、“”（）"
_MIN_QUANTITIES = 2  # numbers in a word problem
_ASKS_KNOWLEDGE = re.compile(r"\b(?:who|whom|whose|when|where|which|capital|explain|describe|define|what (?:is|are|was|"
                             r"were|does|do))\b")
_ASKS_KNOWLEDGE_ZH = re.compile("谁|什么|哪|何时|为什么|介绍|解释|简述|定义")


def find_subcategory(prompt, verifiable=None, has_tests=False):
    """One of config.SUBCATEGORIES, or None.

    The first kind of which the prompt holds a typical word, in their order; else arithmetic, if it holds
    two numbers and has an answer for the maths verifier; else knowledge, if it asks who, what, when, where, which or
    for an explanation. With tests always code; never translation or writing with an answer for the maths verifier.
    """
    if has_tests:
        return "code"
    lower, is_ascii = prompt.lower(), prompt.isascii()
    words = {word.strip(_PUNCTUATION) for word in lower.split()}
    skipped = _NO_MATHS if verifiable == "math" else ()  # a word problem about letters
    first = min((topic for word in words & _TOPIC_WORDS if (topic := _TOPIC_OF_WORD[word]) not in skipped),
                default=len(_TOPICS))
    for stretch, topic in _ASCII_TOPIC_STRETCHES if is_ascii else _TOPIC_STRETCHES:
        if topic >= first:
            break
        if stretch in lower and topic not in skipped:
            first = topic
            break
    if first < len(_TOPICS):
        return _TOPICS[first][0]
    if verifiable == "math":
        if _TWO_NUMBERS.search(prompt):  # as most do: sooner found than all are counted
            return "arithmetic"
        count = bool(_DIGIT.search(prompt)) + len(_NUMBERS & words)
        if count < _MIN_QUANTITIES and not is_ascii:
            count += len(_CHINESE_NUMBERS.findall(prompt))
        if count >= _MIN_QUANTITIES:
            return "arithmetic"
    asks = _ASKS_KNOWLEDGE.search(lower) or not is_ascii and _ASKS_KNOWLEDGE_ZH.search(prompt)
    return "knowledge" if asks else None


def _holds(text, stretches, is_ascii):
    """Whether a text holds one of the (ASCII, other) stretches."""
    ascii_ones, others = stretches
    for stretch in ascii_ones if is_ascii else ascii_ones + others:
        if stretch in text:
            return True
    return False


_CHOICES = re.compile(r"(?:^|[\s(（])([A-D])[.)、．:：）]")
# (question type, stretches of a prompt in lower case); those before and after multiple_choice.
_TYPES = tuple((name, _stretches(stretches)) for name, stretches in (
    ("code", "write a function|write a program|write a script|write a python|implement a |write code|"
             "编写|写代码|写一个函数|写一个程序|函数实现|用python|用 python"),
    ("proof", "prove that|prove:|show that|proof of|证明|求证|试证")))
_LATER_TYPES = tuple((name, _stretches(stretches)) for name, stretches in (
    ("true_false", "true or false|是否正确|判断对错|判断正误|对还是错"),
    ("fill_in", "___|\\_\\_|fill in|(  )|[mask]|[blank]|（ ）|（  ）|（）|填空|横线"),
    ("rewrite", "rewrite|rephrase|paraphrase|summarize|summarise|translate|proofread|shorten |correct the grammar|"
                "改写|润色|翻译|译成|译为|总结|概括|缩写|扩写|纠正")))


def find_question_type(prompt, has_tests=False):
    """One of config.QUESTION_TYPES: the first that fits, in their order. multiple_choice: options A, B, C, in a row."""
    if has_tests:
        return "code"
    lower, is_ascii = prompt.lower(), prompt.isascii()
    for name, stretches in _TYPES:
        if _holds(lower, stretches, is_ascii):
            return name
    if "C" in prompt and "".join(dict.fromkeys(_CHOICES.findall(prompt))).startswith("ABC"):
        return "multiple_choice"
    for name, stretches in _LATER_TYPES:
        if _holds(lower, stretches, is_ascii):
            return name
    return "open"


# Sentences: lines, and what ends in a full stop, before white space where that could be a decimal point. That of a
# step's number ends nothing.
_SENTENCE_END = re.compile(r"\n+|(?<=[.!?;])(?<!^\d[.])(?<!^\d\d[.])(?<!^[Ss]tep \d[.])\s+|(?<=[。！？；])",
                           re.MULTILINE)
# A sign of equality or consequence with something on both sides, not a program's == or >=.
_EQUATION = re.compile(r"[\w)\]}!%²³°$*] ?(?:=|≈|\\approx|\\Rightarrow|\\implies|⇒|≤|≥|\\le|\\ge)(?![=<>]) ?[^\s=]|∴|∵")
_STEP_START = re.compile(r"(?:step|步骤|第)\s?[\d一二三四五六七八九十]|\(?\d{1,2}[.)、．]\s|（\d{1,2}）"
                         r"|首先|其次|然后|接着|最后|(?:first|second|third|next|then|finally)\b", re.IGNORECASE)
_INFERENCE = re.compile(r"\b(?:therefore|thus|hence|because|since|implies|it follows)\b|(?:^|, )so\b"
                        r"|因此|所以|因为|由于|于是|从而|故(?![事障意乡])|可得|得到|可知", re.IGNORECASE)
_BEFORE_STEP = " \t#*>"  # marks of lists and headings
_FENCED = re.compile(r"^[ \t]*(?:```|~~~).*?(?:^[ \t]*(?:```|~~~)[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)
_FINAL_LINE = re.compile(r"^[ \t]*####.*$", re.MULTILINE)


def count_hops(solution):
    """Steps of inference in a solution; None without one.

    Those that GSM8K marks, <<48/2=24>>, if there are any. Else the sentences (and lines) outside code blocks and the
    final "####" line that hold an equation, begin a numbered or named step (1., Step 2, 首先, then), or infer
    (therefore, so, because, 因此): each counts once. At least 1: an answer that is stated at once.
    """
    if not solution.strip():
        return None
    marked = len(ANNOTATION.findall(solution)) if "<<" in solution else 0
    if marked:
        return marked
    if "```" in solution or "~~~" in solution:
        solution = _FENCED.sub("", solution)
    if "####" in solution:
        solution = _FINAL_LINE.sub("", solution)
    return max(1, sum(1 for sentence in _SENTENCE_END.split(solution)
                      if _EQUATION.search(sentence) or _STEP_START.match(sentence.lstrip(_BEFORE_STEP))
                      or _INFERENCE.search(sentence)))


# Characters of other scripts that UTF-8 read as Latin-1 or Windows-1252 becomes, GBK's famous ones, and U+FFFD.
_MOJIBAKE = re.compile("\ufffd|\u00c3[\u0080-\u00bf\u0152-\u0178\u2013-\u2122]|\u00e2\u20ac[\u0080-\u00ff\u0152-\u2122]"
                       "|\u00ef\u00bf\u00bd|\u00f0\u0178[\u0080-\u00ff\u0152-\u2122]|锟斤拷|烫烫烫|屯屯屯")
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f]")  # not tab, newline, carriage return, NEL
_HTML = re.compile(r"</?(?:div|span|p|br|a|table|tr|td|th|li|ul|ol|script|style|font|img|b|i|u|em|strong|sup|sub|"
                   r"center|h[1-6]|body|html|head)(?:\s[^<>]*)?/?>|&(?:nbsp|amp|lt|gt|quot|apos|#\d{1,6}|#x[0-9a-f]{1,6});",
                   re.IGNORECASE)
_MAY_BE_HTML = re.compile("</?[A-Za-z]|&[A-Za-z#]")  # sooner found missing
_INLINE_CODE = re.compile(r"`[^`\n]+`")
_FENCE_LINE = re.compile(r"^[ \t]*(?:```|~~~)", re.MULTILINE)
_LATEX = re.compile(r"\\[a-zA-Z]")
_MONEY = re.compile(r"\\\$|\$\d[\d,.]*(?![\w\\^{$,.])")
_OPEN_ENDS = frozenset(",，、;；:：(（[{【《“‘+*/=&-的和与及或但而且因")
_OPEN_WORDS = frozenset("the a an of and or to in on with for is are was were that which by from as but "
                        "because".split())
_MIN_BROKEN_CHARS = 80  # a shorter reply may be a title, a list item, a formula


def find_faults(text, reply):
    r"""Some of config.FAULTS, in their order.

    mojibake: replacement characters, or UTF-8 that was read in another encoding. control_characters: NUL and others but
    tab and line ends. unclosed_fence: an odd number of lines that begin with ``` or ~~~. unbalanced_math, in a text
    with LaTeX and outside code: an odd number of $, with and without amounts of money, or \( \[ \begin without their
    ends. html: tags and entities outside code. truncated: a reply of 80 characters or more that ends in a comma, an
    opening bracket, an operator or a word that needs another behind it. reply: "" where there is none.
    """
    faults = []
    if not text.isascii() and _MOJIBAKE.search(text):
        faults.append("mojibake")
    if not text.replace("\n", " ").isprintable() and _CONTROL.search(text):
        faults.append("control_characters")
    prose = text
    if "```" in text or "~~~" in text:
        if len(_FENCE_LINE.findall(text)) % 2:
            faults.append("unclosed_fence")
        prose = _FENCED.sub("", text)
    if "\\" in prose and _LATEX.search(prose) and not _is_balanced(prose):
        faults.append("unbalanced_math")
    may_be_html = ("<" in prose or "&" in prose) and _MAY_BE_HTML.search(prose)
    if may_be_html and _HTML.search(_INLINE_CODE.sub("", prose) if "`" in prose else prose):
        faults.append("html")
    end = reply.rstrip()
    if len(end) >= _MIN_BROKEN_CHARS and (end[-1] in _OPEN_ENDS or _last_word(end).lower() in _OPEN_WORDS):
        faults.append("truncated")
    return tuple(faults)


def _last_word(text):
    """What stands behind the last white space or comma, of its last 20 characters."""
    return text[-20:].replace(",", " ").split()[-1]


def _is_balanced(text):
    text = text.replace(r"\\", "")  # which ends a line of a formula, as in \\[2pt]
    if any(text.count(opening) != text.count(closing)
           for opening, closing in ((r"\(", r"\)"), (r"\[", r"\]"), (r"\begin{", r"\end{"))):
        return False
    return text.count("$") % 2 == 0 or _MONEY.sub("", text).count("$") % 2 == 0


# ---- Complexity: how often the student solves it ---------------------------------------------------------------------

def join_prompt(contents):
    """One text of what stands before a reply: system message and turns."""
    return "\n".join(contents)


def prompt_key(prompt):
    """What finds a prompt again: a hash of it in which case, white space and forms of characters make no difference."""
    return xxhash.xxh3_128_hexdigest(normalise(prompt).encode(errors="surrogatepass"))


def pass_rates(run_folder):
    """{prompt_key: (answers that are right, answers)} of the student that `python -m mindpangu.rollout recipe=grpo` or
    a run of it has sampled and graded; a prompt that stands there several times has all of them.

    Raises ValueError if the folder has no pass rates, or broken ones.
    """
    path = Path(run_folder, PASS_RATES)
    if not path.is_file():
        raise ValueError(f"{run_folder} has no {PASS_RATES}: expected the run folder of python -m mindpangu.rollout "
                         "recipe=grpo data=problems data.train=[...] init_from=<the student>, with "
                         "grpo.pass_rate_samples above 0.")
    rates = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            key, passed, samples = prompt_key(row["prompt"]), row["passed"], row["samples"]
            if not 0 <= passed <= samples or not samples:
                raise ValueError("passed is not from 0 to samples")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}:{number}: expected {{\"prompt\", \"passed\", \"samples\"}} ({error!r}): sample "
                             "the answers again.") from None
        before = rates.get(key, (0, 0))
        rates[key] = (before[0] + passed, before[1] + samples)
    return rates


def add_complexity(documents, attributes, rates):
    """Attributes with complexity = 1 - pass rate, None where the run did not have a document's prompt."""
    added = []
    for document, known in zip(documents, attributes, strict=True):
        prompt = split_record(document.record).prompt
        passed, samples = rates.get(prompt_key(prompt), (0, 0)) if prompt else (0, 0)
        added.append(known._replace(complexity=1 - passed / samples if samples else None))
    return added


# ---- What attributes are for -----------------------------------------------------------------------------------------

def judge_attributes(attributes, config):
    """Why a FilterConfig drops a document, (reason, score), or None if it is kept.

    The first criterion that fails, in the order of this list; score: the number that failed, 0 where it is no number:
    too_short, too_long, language, formatting (the number of such faults), repetitive, subcategory, question_type,
    short_answer, unverifiable, too_few_hops, too_many_hops, too_easy, too_hard, low_quality. What is unknown (None)
    fails none of those on hops, complexity and rating, and those on names where some are asked for.
    """
    a = attributes
    num_faults = sum(fault in config.drop_faults for fault in a.faults)
    repetition = max(a.ngram_repetition - config.max_ngram_repetition, a.line_repetition - config.max_line_repetition)
    criteria = (
        ("too_short", a.num_chars < config.min_chars, a.num_chars),
        ("too_long", 0 < config.max_chars < a.num_chars, a.num_chars),
        ("language", bool(config.languages) and a.language not in config.languages, 0),
        ("formatting", num_faults > 0, num_faults),
        ("repetitive", repetition > 0, max(a.ngram_repetition, a.line_repetition)),
        ("subcategory", bool(config.subcategories) and a.subcategory not in config.subcategories, 0),
        ("question_type", bool(config.question_types) and a.question_type not in config.question_types, 0),
        ("short_answer", a.answer_chars < config.min_answer_chars, a.answer_chars),
        ("unverifiable", bool(config.verifiable) and a.verifiable not in config.verifiable, 0),
        ("too_few_hops", a.hops is not None and a.hops < config.min_hops, a.hops),
        ("too_many_hops", a.hops is not None and 0 < config.max_hops < a.hops, a.hops),
        ("too_easy", a.complexity is not None and a.complexity < config.min_complexity, a.complexity),
        ("too_hard", a.complexity is not None and a.complexity > config.max_complexity, a.complexity),
        ("low_quality", a.rating is not None and a.rating < config.min_rating, a.rating))
    return next(((reason, float(score)) for reason, fails, score in criteria if fails), None)


def quality(attributes):
    """Which of near-duplicates to keep: the one with the most of

    16 if verifiable + rating - 3 (0 if unknown) + 4 / (1 + number of faults) + 1 - repetition + a / (a + 1000)

    with the larger share of repeated 10-grams or lines, and a the characters of the answer, or of a text without one.
    A verifiable document comes before any other. From above -2 to below 24.
    """
    a = attributes
    length = a.answer_chars or a.num_chars
    rating = 0 if a.rating is None else a.rating - 3
    repetition = max(a.ngram_repetition, a.line_repetition)
    return (16.0 * (a.verifiable is not None) + rating + 4 / (1 + len(a.faults)) + 1 - repetition
            + length / (length + 1000))


def difficulty(attributes):
    """From 0 (easy) to 1 (hard), for a curriculum: complexity where it is known, else hops / (hops + 4), which 4 hops
    make 0.5 (GSM8K's solutions have 3 to 4 in the mean); 0.5 where neither is."""
    if attributes.complexity is not None:
        return float(attributes.complexity)
    return 0.5 if attributes.hops is None else attributes.hops / (attributes.hops + 4)
