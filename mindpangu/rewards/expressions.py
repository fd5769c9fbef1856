r"""Expressions in LaTeX as functions that have values at points, to 120 digits, exact where they are rational.

Sums, products, fractions, powers and roots are evaluated here, in microseconds. All others go to the parser of
math-verify (latex2sympy) and to sympy, in milliseconds, but only in forms that it reads rightly: it takes 2(3) for 5 (a
mixed number), R for r, 2^3! for (2^3)!, and leaves out primes and the base of 52_8.
"""

import functools
import re
from fractions import Fraction
from typing import NamedTuple

import mpmath

# Two values are the same if they agree to 60 digits: cancellation may have cost the other 60. What is left of a zero
# after cancellation is about 1e-120.
_PRECISE = mpmath.MPContext()
_PRECISE.dps = 120
_TOLERANCE, _ZERO = _PRECISE.mpf("1e-60"), _PRECISE.mpf("1e-100")
_MAX_POWER_BITS = 1_000_000


class Unreadable(ValueError):
    """An answer that can't be compared with another one."""


class Expression(NamedTuple):
    """value_at({name: Fraction}): a Fraction, or a real or complex number of 120 digits; None where there is none."""

    names: frozenset
    value_at: object


def constant(value):
    return Expression(frozenset(), lambda point: value)


def minus(left, right):
    return Expression(left.names | right.names, lambda point: _apply("-", left.value_at(point), right.value_at(point)))


def order(left, right):
    """-1, 0 or 1: the value left is less than, the same as or more than right. Raises Unreadable if one is complex."""
    left, right = _alike(left, right)
    if isinstance(left, _PRECISE.mpc) or isinstance(right, _PRECISE.mpc):
        raise Unreadable("complex numbers have no order")
    return 0 if _same(left, right) else -1 if left < right else 1


def middle(left, right):
    return sum(_alike(left, right)) / 2


def real_value(expression):
    """The value of an expression without names. Raises Unreadable if it has none, or one that is not real."""
    value = None if expression.names else expression.value_at({})
    if not isinstance(value, (Fraction, _PRECISE.mpf)):
        raise Unreadable("no real number")
    return value


def same_expression(left, right, scale=Fraction(1)):
    """Whether left = scale * right wherever they have values."""
    num_defined = 0
    for point in _points(left, right):
        values = left.value_at(point), _apply("*", scale, right.value_at(point))
        if values == (None, None):
            continue
        if None in values or not _same(*_alike(*values)):
            return False
        num_defined += 1
    return num_defined > 0


def constant_ratio(left, right):
    """left / right, if that is the same everywhere and neither zero; else None."""
    ratios = []
    for point in _points(left, right):
        values = left.value_at(point), right.value_at(point)
        if None in values:
            continue
        if any(_same(*_alike(value, Fraction(0))) for value in values):
            return None
        ratios.append(_apply("/", *values))
    return ratios[0] if len(ratios) > 1 and all(_same(*_alike(ratios[0], ratio)) for ratio in ratios) else None


def _points(*expressions):
    """Places to compare expressions at: of both signs, up to 2.5, with nothing special about them."""
    names = sorted(frozenset().union(*(expression.names for expression in expressions)))
    for number in range(4 if names else 1):
        yield {name: (-1) ** (number + place) * Fraction(
            (12347 * (number + 1) + 5711 * (place + 1) * (number + 2)) % 19997, 7919)
            for place, name in enumerate(names)}


def _alike(left, right):
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return left, right
    return _PRECISE.convert(left), _PRECISE.convert(right)


def _same(left, right):
    if isinstance(left, Fraction):
        return left == right
    size = max(abs(left), abs(right))
    return bool(abs(left - right) <= size * _TOLERANCE or size < _ZERO)


@functools.lru_cache(maxsize=4096)
def parse_expression(latex):
    """The Expression that LaTeX spells. Raises Unreadable."""
    tokens = _explicit_tokens(latex)
    try:
        tree, end = _read_sum(tokens, 0)
        if end != len(tokens):
            raise _NotArithmetic
        return Expression(frozenset(_names_in(tree)), lambda point: _value(tree, point))
    except _NotArithmetic:
        return _parse_with_sympy(latex, " ".join(tokens))


def check_tokens(latex):
    """Raises Unreadable for signs that parse_expression does not know, and brackets that are not closed."""
    opened = []
    for token in _explicit_tokens(latex):
        if token in _CLOSING:
            opened.append(_CLOSING[token])
        elif token in _CLOSING.values() and (not opened or opened.pop() != token):
            break
    else:
        if not opened:
            return
    raise Unreadable(f"{latex!r}: brackets that are not closed")


# ---- Tokens, with every product made explicit ------------------------------------------------------------------------

_KNOWN_COMMANDS = frozenset(r"""
    \frac \sqrt \cdot \times \div \pi \infty \binom \log \ln \exp \sin \cos \tan \cot \sec \csc \arcsin \arccos \arctan
    \sinh \cosh \tanh \lfloor \rfloor \lceil \rceil \max \min \gcd \circ \alpha \beta \gamma \delta
    \epsilon \theta \lambda \mu \nu \rho \sigma \tau \phi \psi \omega \Delta \Omega""".split())
_CLOSING = {"{": "}", "(": ")"}
_TOKEN = re.compile(r"\d+(?:\.\d+)?|\.\d+|\\[a-zA-Z]+|\S")
_MIXED = re.compile(r"\\frac\{(\d+)\}\{(\d+)\}")
_AMBIGUOUS = (
    (re.compile(r"(?:/|\\div)\s*(?:\d+|[a-zA-Z])\s*(?:[a-zA-Z(]|\\(?!cdot|times|div|infty))"), "1/2x could be 1/(2x)"),
    (re.compile(r"\^(?:\{[^{}]*\}|\w)\s*!"), "2^3! could be (2^3)!"),
    (re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{4}"), "words"),
    (re.compile(r"[^\x00-\x7f]|['?&~\"<>=;:@#]"), "a sign that is not arithmetic"))


def _explicit_tokens(latex):
    r"""Tokens with \cdot for each product that the parser would take for something else, and fractions for decimals."""
    for pattern, reason in _AMBIGUOUS:
        if pattern.search(latex):
            raise Unreadable(f"{latex!r}: {reason}")
    latex = re.sub(r"\^\{?\s*\\circ\s*\}?", r"\\cdot\\frac{\\pi}{180}", latex)
    tokens, scripts, ends_factor, previous, script = [], [], False, "", ""
    for match in _TOKEN.finditer(latex):
        token, is_script = match[0], previous in ("_", "^")
        script = previous if is_script else script
        is_number, after_number = token[-1].isdigit(), previous[-1:].isdigit()
        if token == "." or (token[0] == "\\" and token not in _KNOWN_COMMANDS):
            raise Unreadable(f"{latex!r}: {token} is unknown")
        if after_number and ((is_number and (ends_factor or script == "^")) or (token == "{" and ends_factor)):
            raise Unreadable(f"{latex!r}: two numbers side by side")
        if ends_factor and (is_number or token in ("(", r"\frac", r"\binom")):
            mixed = _MIXED.match(latex, match.start())
            if not (mixed and previous.isdigit() and int(mixed[1]) < int(mixed[2])):  # 2\frac{1}{2} is no product
                tokens.append(r"\cdot")
        ends_factor = is_number and not is_script
        if token in ("{", "("):
            scripts.append(is_script)
        elif token in ("}", ")"):
            ends_factor = not (scripts.pop() if scripts else True)
        if is_number and "." in token:
            whole, _, decimals = token.partition(".")
            fraction = [r"\frac", "{", str(int(whole + decimals)), "}", "{", str(10 ** len(decimals)), "}"]
            tokens += ["{", *fraction, "}"] if is_script else fraction
        else:
            tokens.append(token)
        previous = token
    return tokens


# ---- Arithmetic ------------------------------------------------------------------------------------------------------

_LETTER = re.compile(r"[a-zA-Z]|\\(?:alpha|beta|gamma|delta|epsilon|theta|lambda|mu|nu|rho|sigma|tau|phi|psi|omega|"
                     r"Delta)")
_CONSTANTS = {r"\pi": _PRECISE.pi, "e": _PRECISE.e, "i": _PRECISE.j}


class _NotArithmetic(Exception):
    pass


def _read_sum(tokens, position):
    sign = tokens[position] if tokens[position : position + 1] in (["+"], ["-"]) else None
    tree, position = _read_product(tokens, position + (sign is not None))
    tree = ("-", Fraction(0), tree) if sign == "-" else tree
    while position < len(tokens) and tokens[position] in ("+", "-"):
        right, end = _read_product(tokens, position + 1)
        tree, position = (tokens[position], tree, right), end
    return tree, position


def _read_product(tokens, position):
    tree, position = _read_power(tokens, position)
    while position < len(tokens) and tokens[position] not in ("+", "-", ")", "}", "]"):
        token = tokens[position]
        operator = "/" if token in ("/", r"\div") else "*"
        if token in ("*", "/", r"\cdot", r"\times", r"\div"):
            position += 1
        elif token == "(" and _LETTER.fullmatch(tokens[position - 1]):
            raise _NotArithmetic  # f(x)
        right, position = _read_power(tokens, position)
        tree = (operator, tree, right)
    return tree, position


def _read_power(tokens, position):
    is_number = position < len(tokens) and tokens[position].isdigit()
    tree, position = _read_atom(tokens, position)
    if is_number and tokens[position : position + 1] == [r"\frac"]:  # a mixed number: products have their \cdot
        fraction, position = _read_atom(tokens, position)
        tree = ("+", tree, fraction)
    if tokens[position : position + 1] == ["^"]:
        power, position = _read_atom(tokens, position + 1)
        if tokens[position : position + 1] in (["^"], ["_"]):
            raise _NotArithmetic
        tree = ("^", tree, power)
    return tree, position


def _read_atom(tokens, position):
    token = tokens[position] if position < len(tokens) else ""
    if token.isdigit():
        return Fraction(int(token)), position + 1
    if token in _CONSTANTS:
        if tokens[position + 1 : position + 2] == ["_"]:
            raise _NotArithmetic
        return _CONSTANTS[token], position + 1
    if _LETTER.fullmatch(token):
        name, position = token.removeprefix("\\"), position + 1
        if tokens[position : position + 1] == ["_"]:
            subscript = re.match(r"_ (?:\{ ([\w ]*) \}|(\w))", " ".join(tokens[position : position + 20]))
            if not subscript:
                raise _NotArithmetic
            name += "_" + (subscript[1] or subscript[2]).replace(" ", "")
            position += len(subscript[0].split())
        return name, position
    if token in ("{", "("):
        tree, position = _read_sum(tokens, position + 1)
        if tokens[position : position + 1] != ["}" if token == "{" else ")"]:
            raise _NotArithmetic
        return tree, position + 1
    if token == r"\frac" and tokens[position + 1 : position + 2] == ["{"]:
        numerator, position = _read_atom(tokens, position + 1)
        if tokens[position : position + 1] != ["{"]:
            raise _NotArithmetic
        denominator, position = _read_atom(tokens, position)
        return ("/", numerator, denominator), position
    if token == r"\sqrt" and tokens[position + 1 : position + 2] == ["{"]:
        tree, position = _read_atom(tokens, position + 1)
        return ("^", tree, Fraction(1, 2)), position
    raise _NotArithmetic


def _names_in(tree):
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, tuple):
        for part in tree[1:]:
            yield from _names_in(part)


def _value(tree, point):
    if isinstance(tree, str):
        return point[tree]
    if not isinstance(tree, tuple):
        return tree if isinstance(tree, Fraction) else +tree
    return _apply(tree[0], _value(tree[1], point), _value(tree[2], point))


def _apply(operator, left, right):
    """None stands for no value, as of 1/0."""
    if left is None or right is None:
        return None
    left, right = _alike(left, right)
    if operator == "+":
        return left + right
    if operator == "-":
        return left - right
    if operator == "*":
        return left * right
    try:
        return left / right if operator == "/" else _power(left, right)
    except (ZeroDivisionError, OverflowError):
        return None


def _power(base, exponent):
    if not isinstance(base, Fraction) or exponent.denominator != 1:
        return _PRECISE.power(_PRECISE.convert(base), _PRECISE.convert(exponent))
    if abs(exponent) * max(base.numerator.bit_length(), base.denominator.bit_length()) > _MAX_POWER_BITS:
        raise OverflowError  # its first digits would not tell it from the next integer
    return base ** int(exponent)


# ---- Everything else -------------------------------------------------------------------------------------------------

def _parse_with_sympy(latex, text):
    import sympy
    from latex2sympy2_extended import latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig

    text = re.sub(r"\\gamma(?![a-zA-Z])", r"\\gamma_{0}", text)  # else it is Euler's constant
    try:
        expression = latex2sympy(text, is_real=True, normalization_config=None,
                                 conversion_config=ConversionConfig(lowercase_symbols=False))
    except Exception as error:  # the parser raises plain Exception for a syntax error, and others of many types
        raise Unreadable(f"{latex!r} is no expression") from error
    if not isinstance(expression, sympy.Expr):
        raise Unreadable(f"{latex!r} is no expression")
    expression = expression.xreplace({sympy.Symbol("i", real=True): sympy.I})
    symbols = {re.sub(r"[{}]", "", symbol.name): symbol for symbol in expression.free_symbols}

    def value_at(point):
        value = expression.xreplace({symbol: sympy.Rational(point[name].numerator, point[name].denominator)
                                     for name, symbol in symbols.items()}).doit()
        if value.is_Rational:
            return Fraction(value.p, value.q)
        real, imaginary = value.evalf(_PRECISE.dps).as_real_imag()
        if not (real.is_Number and imaginary.is_Number and real.is_finite and imaginary.is_finite):
            return None
        real, imaginary = (_PRECISE.mpf(str(part)) for part in (real, imaginary))
        return _PRECISE.mpc(real, imaginary) if imaginary else real

    return Expression(frozenset(symbols), value_at)
