r"""Whether two final answers say the same.

Trees (see answers.py) are compared part by part: exact fractions exactly, expressions by their values at several
points. math-verify's own comparison is not used: it rounds to 6 decimals, so that .0000672 equals .0000674, drops
units, and takes the right side of any equation, so that x^2=5 equals 5.

A wrong answer must not count as right, while a right one in a strange dress may count as wrong: what can't be read
equals nothing but itself.
"""

import functools
import itertools
import re
from fractions import Fraction

from .answers import (
    EQUATION_SIGNS,
    SYMBOL,
    Difference,
    Items,
    Matrix,
    Numeral,
    Quantity,
    Relation,
    Union,
    normalize,
    read,
)
from .expressions import (
    Unreadable,
    check_tokens,
    constant,
    constant_ratio,
    middle,
    minus,
    order,
    parse_expression,
    real_value,
    same_expression,
)
from .units import NO_UNIT, PERCENT

MAX_LENGTH = 500  # characters; no answer worth grading is longer
_LETTERS = re.compile(r"\(?([A-J](?: ?,? ?[A-J])*)\)?")
_LETTER_AND_TEXT = re.compile(r"(?:\(([A-J])\)|([A-J])\s*[.,:)])\s*(.*)")


def same_answer(gold, answer):
    """Whether answer says what gold says. Both are final answers without the sentence around them, LaTeX or plain."""
    if max(len(gold), len(answer)) > MAX_LENGTH:
        return False
    gold, answer = normalize(gold), normalize(answer)
    if not answer:
        return False
    if _without_spaces(gold) == _without_spaces(answer):
        return True
    if _LETTERS.fullmatch(gold) and (letters := _chosen(gold)):  # AA and ADD name no choices
        return _chosen(answer) == letters
    try:
        return _same(_only_item(read(gold)), _only_item(read(answer)))
    except (Unreadable, RecursionError):
        return False


def check_readable(gold):
    """Raises Unreadable, saying why, where only an answer spelt like gold could equal it."""
    _check(gold, parse_expression)


def check_signs(gold):
    """As check_readable, but of expressions only signs and brackets are looked at: takes milliseconds at most."""
    _check(gold, check_tokens)


def _check(gold, check_expression):
    if len(gold) > MAX_LENGTH:
        raise Unreadable(f"{len(gold)} characters, more than {MAX_LENGTH}")
    text = normalize(gold)
    if not text:
        raise Unreadable("empty")
    if not _LETTERS.fullmatch(text):
        _check_expressions(read(text), check_expression)


def _check_expressions(tree, check_expression):
    if isinstance(tree, Quantity):
        if not isinstance(tree.value, Fraction):
            check_expression(tree.value)
    elif isinstance(tree, tuple):
        for part in tree:
            _check_expressions(part, check_expression)


def _without_spaces(text):
    return re.sub(r"(?<![\w,]) +| +(?!\w)", "", text)  # but 1 4 is not 14, and 58, 500 not 58,500


def _only_item(tree):
    """The element of a set of one."""
    is_single = isinstance(tree, Items) and tree.brackets in ("", "{}") and len(tree.items) == 1
    return tree.items[0] if is_single and not isinstance(tree.items[0], Items) else tree


def _chosen(answer):
    """The letters of the choices that an answer names, or None."""
    answer = re.sub(r"\\text\{([^{}]*)\}", r"\1", answer)
    answer = re.sub(r"^(?:选项|选择?|(?i:option|choice)(?![a-z]))\s*", "", answer).strip()
    if re.fullmatch(r"\(?[a-j]\)?", answer):
        answer = answer.upper()
    if match := _LETTERS.fullmatch(answer):
        letters = re.sub(r"[ ,]", "", match[1])
        return set(letters) if len(set(letters)) == len(letters) else None
    match = _LETTER_AND_TEXT.fullmatch(answer)
    # "B. 3 or C. 4" names two.
    return {match[1] or match[2]} if match and not re.search(r"(?<![A-Za-z\\])[A-J](?![A-Za-z])", match[3]) else None


def _same(gold, answer):
    if gold == answer:
        return True
    solutions = _solutions(gold), _solutions(answer)
    if all(solutions):
        return _same_solutions(*solutions) or _same_equation(gold, answer)
    if _is_equation(gold) and _is_equation(answer):
        return not _is_solved(gold) and _same_equation(gold, answer)
    if any(solutions):
        return _solves(solutions[0] or solutions[1], answer if solutions[0] else gold)
    for equation, other in ((gold, answer), (answer, gold)):
        if _is_equation(equation):
            return any(_same(other, side) for side in _agreeing_sides(equation))
    if isinstance(gold, Relation) and isinstance(answer, Relation) and _same_inequality(gold, answer):
        return True
    if any(isinstance(tree, (Relation, Union, Difference)) for tree in (gold, answer)):
        return _same_region(gold, answer)
    if isinstance(gold, Items) and isinstance(answer, Items):
        return _same_items(gold, answer)
    for special, other in ((gold, answer), (answer, gold)):
        if isinstance(special, Items):
            return _same_ratio(special, other) or _same_vector(special, other)
        if isinstance(special, Numeral):
            return _same_numeral(special, other, is_gold=special is gold)
    if isinstance(gold, Matrix) and isinstance(answer, Matrix):
        return [len(row) for row in gold.rows] == [len(row) for row in answer.rows] and all(
            _same(*cells) for rows in zip(gold.rows, answer.rows, strict=True) for cells in zip(*rows, strict=True))
    return isinstance(gold, Quantity) and isinstance(answer, Quantity) and _same_quantity(gold, answer)


# ---- Quantities ------------------------------------------------------------------------------------------------------

def _expression(tree):
    if not isinstance(tree, Quantity):
        raise Unreadable(f"a {type(tree).__name__.lower()} within an expression")
    return constant(tree.value) if isinstance(tree.value, Fraction) else parse_expression(tree.value)


def _same_quantity(gold, answer):
    return any(same_expression(_expression(gold), _expression(answer), scale) for scale in _unit_scales(gold, answer))


def _unit_scales(gold, answer):
    """What answer's number may be multiplied with to be compared with gold's."""
    left, right = gold.unit, answer.unit
    scale = right.multiplier / left.multiplier
    if left.dimensions == right.dimensions:
        return [scale * right.scale / left.scale]
    if left.dimensions and right.dimensions:
        return []
    if PERCENT not in (left.dimensions, right.dimensions):
        return [scale]  # a unit may be left out: it may stand in the question
    # 50 for 50 %, where the question asks for per cent; but 0.5 % is not 0.5, nor 1.8 % 1.8.
    is_percentage = isinstance(gold.value, Fraction) and abs(gold.value) > 1 and (
        left.dimensions or gold.value.denominator == 1)
    return [scale * right.scale / left.scale, *([scale] if is_percentage else [])]


def _same_numeral(numeral, other, is_gold):
    # Where the problem asks for base 8, 52 is 52_8; in an answer only base 10 needs no saying.
    is_bare = isinstance(other, Quantity) and other.unit == NO_UNIT and str(other.value) == numeral.digits
    return is_bare and (is_gold or numeral.base == 10)


# ---- Collections -----------------------------------------------------------------------------------------------------

def _same_items(gold, answer):
    if len(gold.items) != len(answer.items):
        return False
    if {gold.brackets, answer.brackets} <= {"", "{}"}:
        left = list(answer.items)
        for item in gold.items:
            found = next((other for other in left if _same(item, other)), None)
            if found is None:
                return False
            left.remove(found)
        return True
    return gold.brackets == answer.brackets and all(
        _same(*pair) for pair in zip(gold.items, answer.items, strict=True))


def _same_ratio(items, other):
    """1:2 as a fraction."""
    values = [getattr(item, "value", None) for item in items.items]
    return (items.brackets == ":" and len(values) == 2 and all(isinstance(value, Fraction) for value in values)
            and values[1] != 0 and other == Quantity(values[0] / values[1]))


def _same_vector(items, other):
    """A tuple as a column."""
    return (items.brackets == "()" and isinstance(other, Matrix) and all(len(row) == 1 for row in other.rows)
            and _same_items(items, Items("()", tuple(row[0] for row in other.rows))))


# ---- Equations -------------------------------------------------------------------------------------------------------

def _is_equation(tree):
    return isinstance(tree, Relation) and set(tree.signs) <= set(EQUATION_SIGNS)


def _agreeing_sides(equation):
    """What an equation says that something is: the sides of x = 2/3 = 4/6, 2/3 ≈ 0.667, if they agree; else ()."""
    signs = equation.signs[1:] if equation.name else equation.signs
    for (left, right), sign in zip(itertools.pairwise(equation.sides), signs, strict=True):
        if not (_same(left, right) or (sign == r"\approx" and _rounds_to(left, right))):
            return ()
    return equation.sides


def _rounds_to(exact, rounded):
    if not (isinstance(exact, Quantity) and isinstance(rounded, Quantity) and isinstance(rounded.value, Fraction)):
        return False
    error = minus(_expression(exact), _expression(rounded))
    value = None if error.names else error.value_at({})
    last_place = next((Fraction(1, 10**count) for count in range(40) if 10**count % rounded.value.denominator == 0), 0)
    return value is not None and order(abs(value), last_place) < 0


def _solutions(tree):
    """[(name, values)] of x = 1, of x = 1 or 2, of x = 1, y = 2; None of anything else."""
    if isinstance(tree, Relation):
        sides = _agreeing_sides(tree) if tree.name else ()
        return [(tree.name, sides)] if sides else None
    if not (isinstance(tree, Items) and tree.brackets in ("", "{}")):
        return None
    solutions = []
    for item in tree.items:
        found = _solutions(item) if isinstance(item, Relation) else solutions and [(solutions[-1][0], (item,))]
        if not found:
            return None
        solutions += found
    return solutions


def _unknowns(solutions):
    """The names in solutions; x_1 = 1, x_2 = 2 are two solutions of one unknown."""
    names = [name for name, _ in solutions]
    stems = {re.sub(r"_\{?\d\}?", "", name) for name in names}
    return stems if len(stems) == 1 and len(names) > 1 else set(names)


def _values(solutions):
    values = tuple(dict.fromkeys(sides[0] for _, sides in solutions))
    return values[0] if len(solutions) == 1 else Items("", values)


def _each(solutions):
    """(x, y) = (1, 2) as x = 1, y = 2."""
    name, (value, *_) = solutions[0]
    names = name[1:-1].split(",") if name[0] == "(" else []
    is_tuple = len(solutions) == 1 and isinstance(value, Items) and len(value.items) == len(names)
    return [(part, (item,)) for part, item in zip(names, value.items, strict=True)] if is_tuple else solutions


def _same_solutions(gold, answer):
    if len(_unknowns(gold)) == 1 == len(_unknowns(answer)) and _unknowns(gold) == _unknowns(answer):
        return _same(_values(gold), _values(answer))
    gold, answer = _each(gold), dict(_each(answer))
    return gold[0][0] in answer and len(gold) == len(answer) and all(
        name in answer and any(_same(*pair) for pair in itertools.product(sides, answer[name])) for name, sides in gold)


def _solves(solutions, other):
    """Whether values without names say the same: 1, 2 as x = 1 or x = 2; (1, 2) as x = 1, y = 2."""
    if len(solutions) == 1:
        return any(_same(other, side) for side in solutions[0][1])
    if len(_unknowns(solutions)) == 1:
        return _same(other, _values(solutions))
    names = [name for name, _ in solutions]
    return isinstance(other, Items) and other.brackets in ("", "()") and names == sorted(set(names)) and _same_items(
        Items("()", other.items), Items("()", tuple(sides[0] for _, sides in solutions)))


def _difference(relation):
    """Left side less right side."""
    sides = (Quantity(relation.name), *relation.sides) if relation.name else relation.sides
    if len(sides) != 2 or any(getattr(side, "unit", None) != NO_UNIT for side in sides):
        raise Unreadable("a relation between other things than two expressions")
    return minus(*map(_expression, sides))


def _is_solved(relation):
    """Whether its only unknown stands alone, as in x = 5. 2x = 10 does not say that: it may be the question itself."""
    sides = (relation.name, *(getattr(side, "value", None) for side in relation.sides))
    return len(_difference(relation).names) == 1 and any(
        isinstance(side, str) and SYMBOL.fullmatch(side) for side in sides)


def _same_equation(gold, answer):
    """Whether one is a multiple of the other."""
    return all(isinstance(tree, Relation) for tree in (gold, answer)) and constant_ratio(
        _difference(gold), _difference(answer)) is not None


# ---- Inequalities and regions ----------------------------------------------------------------------------------------

_FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", r"\ne": r"\ne"}
_HOLDS = {"<": (-1,), ">": (1,), r"\le": (-1, 0), r"\ge": (0, 1), r"\ne": (-1, 1)}


def _same_inequality(gold, answer):
    if len(gold.sides) != 2 or len(answer.sides) != 2 or _is_equation(gold) or _is_equation(answer):
        return False
    if _is_solved(gold):
        return False
    ratio = constant_ratio(_difference(gold), _difference(answer))
    if ratio is None:
        return False
    return answer.signs[0] == (gold.signs[0] if order(ratio, Fraction(0)) > 0 else _FLIPPED[gold.signs[0]])


def _same_region(gold, answer):
    """Whether intervals, unions, differences, sets and inequalities in one unknown hold the same real numbers.

    They do if they hold the same of all their ends, of numbers between each two, and of numbers beyond.
    """
    ends, unknowns = [], set()
    is_in_gold, is_in_answer = (_membership(tree, ends, unknowns) for tree in (gold, answer))
    if len(unknowns) > 1:
        return False
    ends.sort(key=functools.cmp_to_key(order))
    between = [middle(*pair) for pair in itertools.pairwise(ends)]
    beyond = [middle(ends[0], ends[0]) - 1, middle(ends[-1], ends[-1]) + 1] if ends else [Fraction(0)]
    return all(is_in_gold(number) == is_in_answer(number) for number in (*ends, *between, *beyond))


def _membership(tree, ends, unknowns):
    """Whether a number is in a region; adds the region's ends to ends and its unknowns to unknowns."""
    if isinstance(tree, Union):
        parts = [_membership(part, ends, unknowns) for part in tree.parts]
        return lambda number: any(part(number) for part in parts)
    if isinstance(tree, Difference):
        whole, removed = (_membership(part, ends, unknowns) for part in tree)
        return lambda number: whole(number) and not removed(number)
    if isinstance(tree, Relation) and not _is_equation(tree):
        conditions = list(_conditions(tree, unknowns))
    elif isinstance(tree, Items) and tree.brackets == "{}":
        is_not = [_condition(r"\ne", item, ends) for item in tree.items]
        return lambda number: not all(condition(number) for condition in is_not)
    elif isinstance(tree, Items) and tree.brackets in ("()", "(]", "[)", "[]") and len(tree.items) == 2:
        signs = ">" if tree.brackets[0] == "(" else r"\ge", "<" if tree.brackets[1] == ")" else r"\le"
        conditions = list(zip(signs, tree.items, strict=True))
    else:
        raise Unreadable(f"a {type(tree).__name__.lower()} that is no region")
    conditions = [_condition(sign, end, ends) for sign, end in conditions]
    return lambda number: all(condition(number) for condition in conditions)


def _conditions(relation, unknowns):
    """(sign, end) of x < 2, 2 > x and 1 < x < 2."""
    places = [place for place, side in enumerate(relation.sides)
              if isinstance(side, Quantity) and isinstance(side.value, str) and SYMBOL.fullmatch(side.value)]
    if (len(places) != 1 or len(relation.sides) > 3 or (len(relation.sides) == 3 and places != [1])
            or not set(relation.signs) <= set(_FLIPPED)):
        raise Unreadable("an inequality that does not say where one unknown is")
    unknowns.add(relation.sides[places[0]].value)
    for place, sign in enumerate(relation.signs):
        yield (sign, relation.sides[place + 1]) if place == places[0] else (_FLIPPED[sign], relation.sides[place])


def _condition(sign, end, ends):
    if getattr(end, "unit", None) != NO_UNIT:
        raise Unreadable("an end of a region that is no number")
    if end.value in (r"\infty", r"+\infty", r"-\infty"):
        if sign != (">" if end.value[0] == "-" else "<"):
            raise Unreadable("a region that contains infinity")
        return lambda number: True
    end = real_value(_expression(end))
    ends.append(end)
    return lambda number: order(number, end) in _HOLDS[sign]
