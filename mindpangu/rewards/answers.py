r"""Final answers as trees: collections, relations, matrices, words, and at the leaves quantities.

An answer is written in LaTeX or plainly, in English or Chinese, without the sentence around it. What can't be read for
certain is not read: 1/2x, 1 4, 二三.
"""

import itertools
import re
from fractions import Fraction
from typing import NamedTuple

from .expressions import Unreadable
from .units import CURRENCIES, NO_UNIT, UNITS, Unit, read_unit


class Quantity(NamedTuple):
    value: Fraction | str  # exact, or an expression in LaTeX
    unit: Unit = NO_UNIT


class Numeral(NamedTuple):
    """A number in another base, such as 52_8."""

    digits: str
    base: int


class Words(NamedTuple):
    text: str


class Items(NamedTuple):
    """brackets: "" a list, "{}" a set, ":" a ratio, else those of a tuple or an interval, such as "(]"."""

    brackets: str
    items: tuple


class Union(NamedTuple):
    parts: tuple


class Difference(NamedTuple):
    whole: tuple
    removed: tuple


class Relation(NamedTuple):
    """signs[i] stands between two sides. name: x in x = 5; it is a side in other relations."""

    name: str | None
    sides: tuple
    signs: tuple


class Matrix(NamedTuple):
    rows: tuple


# ---- Characters: each sign in one form -------------------------------------------------------------------------------

_CHARACTERS = str.maketrans({chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)} | {  # fullwidth
    "、": ",", "。": ".", "∶": ":", "’": "'", "“": "", "”": "", "￥": "¥", "\u3000": " ", "\xa0": " ", "~": " ",
    "−": "-", "–": "-", "×": r"\times ", "÷": r"\div ",
    "·": r"\cdot ", "⋅": r"\cdot ", "≤": r"\le ", "⩽": r"\le ", "≦": r"\le ",
    "≥": r"\ge ", "⩾": r"\ge ", "≧": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "∈": r"\in ", "∪": r"\cup ",
    "∖": r"\setminus ", "∅": r"\emptyset ", "∞": r"\infty ", "√": r"\sqrt ", "±": r"\pm ", "°": r"^\circ ",
    "℃": r"^\circ C", "¢": r"\text{ cents}", "ℝ": r"\mathbb{R}", "∠": r"\angle ", "△": r"\triangle ", "π": r"\pi ",
    "α": r"\alpha ", "β": r"\beta ", "θ": r"\theta ", "λ": r"\lambda ", "μ": r"\mu ", "ω": r"\omega ",
    "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}"})
_SCRIPTS = ((re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+"), "^", str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")),
            (re.compile("[₀₁₂₃₄₅₆₇₈₉]+"), "_", str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")))
_COMMAND = re.compile(r"\\(?:[a-zA-Z]+|!\s*|.)", re.DOTALL)
_COMMANDS = (
    dict.fromkeys("left right big Big bigg Bigg bigl bigr Bigl Bigr displaystyle textstyle limits mathbf mathit "
                  "boldsymbol bm mathsf ( ) [ ] !".split(), "")
    | dict.fromkeys(", ; : > quad qquad".split(), " ") | {"": " "}
    | dict.fromkeys("mbox textbf textit textrm textnormal mathrm".split(), r"\text")
    | dict.fromkeys("dfrac tfrac cfrac".split(), r"\frac") | dict.fromkeys("dbinom tbinom".split(), r"\binom")
    | {"leq": r"\le ", "leqslant": r"\le ", "geq": r"\ge ", "geqslant": r"\ge ", "neq": r"\ne ", "lt": "<", "gt": ">",
       "lbrace": r"\{", "rbrace": r"\}", "langle": "(", "rangle": ")", "lvert": "|", "rvert": "|", "vert": "|",
       "lbrack": "[", "rbrack": "]", "ast": "*", "backslash": r"\setminus ", "varnothing": r"\emptyset ", "mid": "|",
       "vee": r"\lor ", "colon": ":", "degree": r"^\circ ", "$": "$", "%": "%", "lg": r"\log_{10}", "varphi": r"\phi "})
_PLAIN_FUNCTIONS = re.compile(r"(?<![\\a-zA-Z])(sqrt|arcsin|arccos|arctan|sin|cos|tan|cot|sec|csc|log|ln|exp|pi|theta|"
                              r"alpha|beta)(?![a-zA-Z])")
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_OR = re.compile(r",?\s*(?:(?<![a-zA-Z\\])or(?![a-zA-Z])|或者|或)\s*")
_AND = re.compile(r",?\s*(?:(?<![a-zA-Z\\])and(?![a-zA-Z])|以及|和|与|及)\s*")
_ROUGHLY = re.compile(r"(?:约为|大约|约|approximately|about|exactly)\s*")
_SPELT = {"一半": r"\frac{1}{2}", "无解": r"\emptyset", "no solution": r"\emptyset", "no solutions": r"\emptyset",
          "all real numbers": r"\mathbb{R}", "全体实数": r"\mathbb{R}", "任意实数": r"\mathbb{R}"}


def normalize(text):
    """An answer with each sign in one form, ASCII and LaTeX, without layout, delimiters and a full stop."""
    text = re.sub(r"√\s*(\d+|[a-zA-Z])", r"\\sqrt{\1}", text).translate(_CHARACTERS)
    for pattern, sign, plain in _SCRIPTS:
        text = pattern.sub(lambda match, sign=sign, plain=plain: f"{sign}{{{match[0].translate(plain)}}}", text)
    text = re.sub(r"^\s*\*\*(.+?)\*\*", r"\1", text, flags=re.DOTALL).strip(" \t\r\n*`")
    # Dollar signs in pairs delimit mathematics; a single one is money, and so is \$.
    if len(re.findall(r"(?<!\\)\$", text)) % 2 == 0:
        text = re.sub(r"(?<!\\)\$", "", text)
    text = re.sub(r"(?<=\d)\\,(?=\d{3}(?!\d))", "", text).replace("{,}", ",")
    text = _COMMAND.sub(lambda match: _COMMANDS.get(match[0][1:].strip(), match[0]), text)
    text = _TEXT.sub(_without_text, _unboxed(text))
    text = _PLAIN_FUNCTIONS.sub(r"\\\1", text)
    text = re.sub(r"(?<![\\a-zA-Z])(?:infinity|inf|oo)(?![a-zA-Z])", r"\\infty", text)
    for plain, sign in (("<=", r"\le "), (">=", r"\ge "), ("!=", r"\ne "), ("**", "^")):
        text = text.replace(plain, sign)
    text = re.sub(r"\s+", " ", _with_braces(text)).lstrip(" ,:=").rstrip(" .,;:")
    text = _SPELT.get(_TEXT.sub(r"\1", text).strip().casefold(), text)
    text = _AND.sub(", ", _OR.sub(r" \\lor ", text))
    text = re.sub(r"(?<=\d)\s*\(([\u4e00-\u9fff/]+)\)$", r"\1", text)  # 18(个)
    text = _ROUGHLY.sub("", text, count=1) if _ROUGHLY.match(text) else text
    return "-" + text[1:] if text.startswith("负") else text


def _without_text(match):
    r"""The content of a \text{}, unless it is words or a unit."""
    content = match[1].strip()
    is_unit = content in UNITS and re.search(r"[\d})]\s*$", match.string[: match.start()])
    is_words = re.search(r"[^\W\d_]{2}|[\u4e00-\u9fff]", content) and not re.search(r"\d", content)
    if content in ("or", "and", "或", "和") or not (is_unit or is_words):
        return f" {content} "
    return rf"\text{{{match[1]}}}"


def _closing(text, opening):
    """Where the brace at a position closes, or None."""
    depth = 0
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, opening):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.start()
    return None


def _unboxed(text):
    for _ in range(text.count("box")):
        match = re.search(r"\\f?box(?:ed)?\s*(?=\{)", text)
        end = match and _closing(text, match.end())
        if not end:
            break
        text = text[: match.start()] + text[match.end() + 1 : end] + text[end + 1 :]
    return text


def _with_braces(text):
    r"""\frac12, \frac{1}2, \sqrt3, \sqrt(3), 2^(3), x^-1 with the braces that they stand for."""
    text = re.sub(r"\\(frac|sqrt|binom)\s+", r"\\\1", text)
    text = re.sub(r"([\^_])\s*-\s*(\d+|[a-zA-Z])", r"\1{-\2}", text)
    # From the last one on, so that the arguments of the outer ones are complete.
    for match in reversed(list(re.finditer(r"\\(?:frac|binom)|\\sqrt(?:\[\w+\])?|\^(?=\()", text))):
        position, has_two = match.end(), match[0] in (r"\frac", r"\binom")
        for _ in range(2 if has_two else 1):
            argument = re.compile(r"\s*(?:(\{)|(\()|\\[a-zA-Z]+|[0-9a-zA-Z])").match(text, position)
            if argument is None or (argument[2] and has_two):
                break
            start, end = argument.end() - len(argument[0].strip()), argument.end()
            if argument[1] or argument[2]:
                closing = _matching(text, start)
                if closing is None:
                    break
                end = closing + 1
            content = text[start + 1 : end - 1] if argument[1] or argument[2] else text[start:end]
            text = f"{text[:position]}{{{content}}}{text[end:]}"
            position += len(content) + 2
    return text


# ---- Structure -------------------------------------------------------------------------------------------------------

_TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|.", re.DOTALL)
_DEPTHS = dict.fromkeys(("(", "[", "{", r"\{", r"\begin"), 1) | dict.fromkeys((")", "]", "}", r"\}", r"\end"), -1)
EQUATION_SIGNS = ("=", r"\approx", r"\in")
_RELATIONS = (*EQUATION_SIGNS, "<", ">", r"\le", r"\ge", r"\ne")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)")
_LETTER = r"(?:[A-Za-z]|\\(?:alpha|beta|gamma|delta|theta|lambda|mu|phi|omega|rho|sigma|Delta))"
_SCRIPT = r"(?:_(?:\w|\{[^{}]*\}))?"
SYMBOL = re.compile(_LETTER + _SCRIPT)
_ARGUMENTS = r"(?:\([A-Za-z0-9]+(?:, ?[A-Za-z0-9]+)*\))?"
_NAME = re.compile(rf"(?:\\(?:angle|triangle|overline) ?)?(?:\{{?{_LETTER}{_SCRIPT}'? ?\}}?){{1,4}}{_ARGUMENTS}"
                   rf"|\({_LETTER}{_SCRIPT}(?:, ?{_LETTER}{_SCRIPT})+\)|\|[A-Z]{{2}}\|"
                   r"|\\text\{[^{}]*\}|[\u4e00-\u9fff]{1,12}")
_MATRIX = re.compile(r"\\begin\{(?:[pbB]?matrix|array)\}(?:\{[clr| ]*\})?(.*)\\end\{(?:[pbB]?matrix|array)\}")
_NUMERAL = re.compile(r"([0-9A-Z]*[0-9][0-9A-Z]*)_(?:\{(\d+)\}|(\d))")
_REALS = Items("()", (Quantity(r"-\infty"), Quantity(r"\infty")))


def read(text):
    """The tree of a normalized answer. Raises Unreadable."""
    text = text.strip()
    while text[:1] == "{" and _closing(text, 0) == len(text) - 1:
        text = text[1:-1].strip()
        if builder := _set_builder(text):
            return read(builder)
    if not text:
        raise Unreadable("a part is empty")
    alternatives, _ = _split(text, (r"\lor",))
    if len(alternatives) > 1:
        parts = tuple(read(part) for part in alternatives)
        is_region = all(isinstance(part, Relation) and part.signs[0] not in ("=", r"\in") for part in parts)
        return Union(parts) if is_region else _unordered("", parts)
    parts, _ = _split(_THOUSANDS.sub(_without_commas, text), (",", ";"))
    if len(parts) > 1:
        return _unordered("", tuple(read(part) for part in parts))
    text = parts[0]
    if _split(text, EQUATION_SIGNS)[1]:
        return _read_relation(*_split(text, _RELATIONS))
    parts, _ = _split(text, (r"\cup",))
    if len(parts) > 1:
        return Union(tuple(map(read, parts)))
    parts, signs = _split(text, (r"\setminus",))
    if len(signs) > 1:
        raise Unreadable(f"{len(signs)} differences")
    if signs:
        return Difference(*map(read, parts))
    sides, signs = _split(text, _RELATIONS)
    if signs:
        return _read_relation(sides, signs)
    if text in (r"\mathbb{R}", r"\mathbb R"):
        return _REALS
    if text == r"\emptyset":
        return Items("{}", ())
    matrix = _MATRIX.fullmatch(text)
    if matrix:
        rows, _ = _split(matrix[1].strip().removesuffix("\\\\"), ("\\\\",))
        return Matrix(tuple(tuple(read(cell) for cell in _split(row, ("&",))[0]) for row in rows))
    if _TOKEN.match(text)[0] in ("(", "[", r"\{") and _matching(text, 0) == len(text) - len(_TOKEN.findall(text)[-1]):
        return _read_brackets(text)
    if text.count(r"\pm") == 1:
        return Items("", tuple(read(text.replace(r"\pm", sign)) for sign in "+-"))
    words = _read_words(text)
    if words:
        return words
    parts, _ = _split(text, (":",))
    if len(parts) > 1:
        return Items(":", tuple(read(part) for part in parts))
    numeral = _NUMERAL.fullmatch(text.replace(" ", ""))
    if numeral:
        return Numeral(numeral[1].lstrip("0"), int(numeral[2] or numeral[3]))
    return _read_quantity(text)


def _split(text, separators):
    """The parts between separators outside of brackets, and these separators."""
    parts, found, depth, start = [], [], 0, 0
    for match in _TOKEN.finditer(text):
        depth += _DEPTHS.get(match[0], 0)
        if depth == 0 and match[0] in separators:
            parts.append(text[start : match.start()].strip())
            found.append(match[0])
            start = match.end()
    return [*parts, text[start:].strip()], found


def _matching(text, opening):
    """Where the bracket at a position closes, of whatever kind, or None."""
    depth = 0
    for match in _TOKEN.finditer(text, opening):
        depth += _DEPTHS.get(match[0], 0)
        if depth == 0:
            return match.start()
    return None


def _without_commas(match):
    before = match.string[: match.start()]
    depth = sum(before.count(bracket) for bracket in ("(", "[", r"\{"))
    depth -= sum(before.count(bracket) for bracket in (")", "]", r"\}"))
    return match[0].replace(",", "") if depth == 0 else match[0]  # (1,234) are two numbers


def _unordered(brackets, items):
    """A list or set. Lists inside of it, from ± or "or", are part of it."""
    flat = itertools.chain.from_iterable(
        item.items if isinstance(item, Items) and item.brackets == "" else (item,) for item in items)
    return Items(brackets, tuple(dict.fromkeys(flat)))


def _read_brackets(text):
    opening = _TOKEN.match(text)[0]
    end = _matching(text, 0)
    inner, brackets = text[len(opening) : end].strip(), opening[-1] + text[-1]
    if brackets == "{}":
        if not inner:
            return Items("{}", ())
        if builder := _set_builder(inner):
            return read(builder)
        parts, _ = _split(inner, (",", ";"))
        return _unordered("{}", tuple(read(part) for part in parts))
    parts, _ = _split(inner, (",", ";"))
    if len(parts) == 1 and (brackets == "()" or inner.startswith(r"\begin")):
        return read(inner)
    if len(parts) == 1 or "{" in brackets or "}" in brackets or (len(parts) > 2 and brackets not in ("()", "[]")):
        raise Unreadable(f"brackets {brackets} around {len(parts)} parts")
    return Items(brackets, tuple(read(part) for part in parts))


def _set_builder(inner):
    """The condition in x | x > 5."""
    match = re.match(r"([^|:]*)[|:](.*)", inner)
    return match[2] if match and _NAME.fullmatch(match[1].split(r"\in")[0].strip()) else None


def _read_relation(sides, signs):
    if not all(sides):
        raise Unreadable("a side of a relation is empty")
    is_equation = set(signs) <= set(EQUATION_SIGNS)
    if is_equation and len(sides) == 2 and _NAME.fullmatch(sides[1]) and not _NAME.fullmatch(sides[0]):
        sides = sides[::-1]
    name = sides[0].replace(" ", "") if is_equation and _NAME.fullmatch(sides[0]) else None
    # x = 2x + 3 is an equation, not what x is.
    if name and any(_symbols(sides[0].partition("(")[0]) & _symbols(side) for side in sides[1:]):
        name = None
    return Relation(name, tuple(map(read, sides[1:] if name else sides)), tuple(signs))


def _symbols(text):
    return set(re.findall(_LETTER + _SCRIPT, _TEXT.sub("", text)))


_WORDS = re.compile(r"[^\W\d_]+(?:[ '.,-]+[^\W\d_]+)*")


def _read_words(text):
    content = _TEXT.sub(r" \1 ", text).strip()
    if not _WORDS.fullmatch(content):
        return None
    # Two letters are a product, and so could three be; but as a product, live would equal evil.
    is_word = content != text or re.search(r"[a-zA-Z]{3}|[\u4e00-\u9fff]", content) or content.casefold() == "no"
    if not is_word or _without_chinese_number(content):
        return None
    return Words(re.sub(r"^(?:the|an?) ", "", re.sub(r"\s+", " ", content.casefold())))


# ---- Quantities ------------------------------------------------------------------------------------------------------

_DIGITS = {digit: value for value, digits in enumerate(("零〇", "一", "二两", "三", "四", "五", "六", "七", "八", "九"))
           for digit in digits}
_POWERS_OF_TEN = {"十": 10, "百": 100, "千": 1000, "万": 10**4, "亿": 10**8}
_CHINESE = f"[{''.join(_DIGITS)}{''.join(_POWERS_OF_TEN)}]+"
_CHINESE_DECIMALS = rf"(?:点([{''.join(_DIGITS)}]+))?"
_CHINESE_FRACTION = re.compile(rf"(-?)(?:(\d+|{_CHINESE})又)?(\d+|{_CHINESE})分之(\d+(?:\.\d+)?|{_CHINESE})"
                               rf"{_CHINESE_DECIMALS}(.*)")
_CHINESE_NUMBER = re.compile(rf"(-?)({_CHINESE}){_CHINESE_DECIMALS}(.*)")
_DECIMAL = r"(?:\d+(?:\.\d+)?|\.\d+)"
_POWER = r"\^\{?([-+]?\d{1,3})\}?"
_PLAIN = re.compile(rf"({_DECIMAL})(?:\s*/\s*({_DECIMAL}))?")
_FRACTION = re.compile(rf"(\d*)\s*\\frac\{{\s*({_DECIMAL})\s*\}}\{{\s*({_DECIMAL})\s*\}}|(\d+) (\d+)/(\d+)")
_SCIENTIFIC = re.compile(rf"({_DECIMAL})\s*(?:(?:\\times|\\cdot|\*)\s*10{_POWER}|[eE]([-+]?\d{{1,3}}))")
_REPEATING = re.compile(r"(\d*\.\d*?)(?:\\overline\{(\d+)\}|\\dot\{?(\d)\}?)")
_MONEY = re.compile(r"(-?)\s*(?:US|RMB)?\s*([$¥€£])\s*")
_UNIT_START = re.compile(r"\s*(?=\\text|\^\{?\\circ|[%‰\u4e00-\u9fff])|\s+(?=[A-Za-z])|(?<=\d)(?=[A-Za-z])")
_ANGLE_FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-z])")


def _read_quantity(text):
    text = (_without_chinese_number(text) or text).removeprefix("+").strip()
    money = _MONEY.match(text)
    text = money[1] + text[money.end() :] if money else text
    value, unit = text, NO_UNIT
    for match in _UNIT_START.finditer(text):
        before, behind = text[: match.start()], text[match.start() :]
        is_number = _read_number(before) is not None
        if not before or (_ANGLE_FUNCTION.search(before) and r"\circ" in behind):
            continue
        words = _TEXT.sub(r" \1 ", re.sub(r"\^\{?\\circ ?\}?\s*", "°", behind))
        found = read_unit(re.sub(r"°\s*([CF])\b", r"°\1", words), any_words=is_number or words != behind)
        if found is not None:
            value, unit = before, found
            break
    if money:
        currency = UNITS[CURRENCIES[money[2]]]
        if unit.dimensions not in ((), currency.dimensions):
            raise Unreadable(f"{text!r} has two units")
        unit = currency._replace(multiplier=unit.multiplier)
    number = _read_number(value)
    return Quantity(value if number is None else number, unit)


def _read_number(text):
    """The exact value of a plain number, or None. Raises Unreadable for a denominator of zero."""
    sign, text = (-1, text[1:]) if text[:1] == "-" else (1, text.removeprefix("+"))
    text = text.strip()
    if match := _PLAIN.fullmatch(text):
        return sign * _ratio(match[1], match[2] or "1")
    if match := _FRACTION.fullmatch(text.replace(r"\frac{-", r"\frac{") if not text[:1].isdigit() else text):
        sign = -sign if r"\frac{-" in text else sign
        fraction = _ratio(match[2] or match[5], match[3] or match[6])
        whole = match[1] or match[4]
        if whole and not fraction < 1:
            return None  # 2\frac{3}{2} may be a product
        return sign * (int(whole or 0) + fraction)
    if match := _SCIENTIFIC.fullmatch(text):
        return sign * Fraction(match[1]) * Fraction(10) ** int(match[2] or match[3])
    if match := _REPEATING.fullmatch(text):
        start, period = match[1], match[2] or match[3]
        shift = Fraction(1, 10 ** len(start.partition(".")[2]))
        return sign * (Fraction(f"0{start}0") + shift * Fraction(int(period), 10 ** len(period) - 1))
    return None


def _ratio(numerator, denominator):
    if not Fraction(denominator):
        raise Unreadable("a denominator is zero")
    return Fraction(numerator) / Fraction(denominator)


def _without_chinese_number(text):
    """A text that starts with a Chinese numeral with it in digits: 三分之二, 百分之三十, 十八个苹果; else None."""
    if match := _CHINESE_FRACTION.fullmatch(text):
        sign, whole, denominator, numerator, decimals, unit = match.groups()
        if denominator == "百" and not whole:
            number = _chinese_decimal(numerator, decimals)
            digits = number and f"{number}%"
        else:
            parts = [_chinese_integer(part) for part in (whole or "零", numerator, denominator)]
            digits = None if None in parts or decimals else f"{parts[0] or ''}\\frac{{{parts[1]}}}{{{parts[2]}}}"
    elif match := _CHINESE_NUMBER.fullmatch(text):
        sign, integer, decimals, unit = match.groups()
        digits = _chinese_decimal(integer, decimals)
    else:
        return None
    # 三角形 is no number.
    return sign + digits + unit if digits and read_unit(unit, after_counters=True) is not None else None


def _chinese_decimal(integer, decimals):
    number = integer if "." in integer else _chinese_integer(integer)
    if number is None:
        return None
    return f"{number}.{''.join(str(_DIGITS[digit]) for digit in decimals)}" if decimals else str(number)


def _chinese_integer(text):
    """The integer that digits or Chinese numerals spell; None where it is not certain: 二三 may mean two or three."""
    if not set(text) <= _DIGITS.keys() | _POWERS_OF_TEN.keys():
        return int(text) if text.isdecimal() else None
    if all(character in _DIGITS for character in text):
        is_certain = len(text) == 1 or len(text) >= 4 or "〇" in text
        return int("".join(str(_DIGITS[character]) for character in text)) if is_certain else None
    total, section, digit, last_power = 0, 0, None, None
    for character in text:
        if character in _DIGITS:
            if digit:
                return None
            digit = _DIGITS[character]
            continue
        power = _POWERS_OF_TEN[character]
        if power >= 10**4:
            section += digit or 0
            total = (total + section) * power if power == 10**8 else total + section * power
            section = 0
        elif digit or power == 10:
            section += (digit or 1) * power
        else:
            return None
        digit, last_power = None, power
    if digit and last_power > 10 and "零" not in text:
        return None  # 一百二 is 120
    return total + section + (digit or 0)
