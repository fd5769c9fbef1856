"""The two programs that judge an answer's code, each isolated by the sandbox, and the link between them.

The answer runs in one (serve_answer), the tests in the other (judge_tests), which never runs a line of the answer: the
names that a test leaves to the answer stand for Remotes there, whose calls travel to the answer's process and come back
as plain data. A result has no behaviour of its own, the verdicts leave by a descriptor that only the judge has, and
neither process sees the other: what the answer does to its own interpreter, it cannot do to a verdict. The answer sees
arguments, never tests or expected values.

What travels as data, with its exact type: None, bool, int, float, complex, str, bytes, bytearray, list, tuple, dict,
set, frozenset, range, named tuples, the containers of collections, Fraction, Decimal, dates and times; exceptions by
their names. Subclasses of these types arrive as the type itself. What a call changes in its arguments comes back.
Everything else stays where it is, and a Remote stands for it. One never equals data. It hands on attributes, calls,
items, length, iteration, text and truth; calls of its methods with arguments only if the test names a class of the
answer (a capitalised name), for `f(1).startswith("x")` must not ask the answer whether it is right.

Standard library only, and as little as possible: both processes pay for every import.
"""

import builtins
import collections
import importlib
import json
import operator
import os
import struct
import sys
from types import ModuleType

# In the judge's output, one a line: the stages that the answer passed, then a verdict for each test.
STAGES = ("compiled", "ran")
PASSED = "correct"
LOST = "lost"  # the answer's process ended, or does not keep to the protocol

COMPILE, RUN, FIND = range(3)  # what the answer's process offers from the start
_LENGTH = struct.Struct(">I")
_ANSWER, _TEST = "answer", "__main__"  # modules: a test is a program, with "if __name__ == ..." and all
# An int with more digits than Python converts to and from decimals (4300) travels in hexadecimal.
_LONG_INT = 10**4000
# (module, name) -> the arguments that build an equal value
_BUILT = {
    ("builtins", "complex"): lambda value: (value.real, value.imag),
    ("builtins", "bytes"): lambda value: (list(value),),
    ("builtins", "bytearray"): lambda value: (list(value),),
    ("builtins", "set"): lambda value: (list(value),),
    ("builtins", "frozenset"): lambda value: (list(value),),
    ("builtins", "range"): lambda value: (value.start, value.stop, value.step),
    ("collections", "deque"): lambda value: (list(value), value.maxlen),
    ("collections", "OrderedDict"): lambda value: (dict(value),),
    ("collections", "Counter"): lambda value: (dict(value),),
    ("collections", "defaultdict"): lambda value: (value.default_factory, dict(value)),
    ("fractions", "Fraction"): lambda value: (value.numerator, value.denominator),
    ("decimal", "Decimal"): lambda value: (str(value),),
    ("datetime", "date"): lambda value: (value.year, value.month, value.day),
    ("datetime", "time"): lambda value: (value.hour, value.minute, value.second, value.microsecond, value.tzinfo),
    ("datetime", "datetime"): lambda value: (value.year, value.month, value.day, value.hour, value.minute,
                                             value.second, value.microsecond, value.tzinfo),
    ("datetime", "timedelta"): lambda value: (value.days, value.seconds, value.microseconds),
    ("datetime", "timezone"): lambda value: (value.utcoffset(None),),
}
_BASES = ((int, int), (float, float), (str, str.__str__), (bytes, bytes), (list, list), (tuple, tuple), (dict, dict),
          (set, set), (frozenset, frozenset))
_PLAIN_TYPES = {kind.__name__: kind for kind in (int, float, complex, bool, str, bytes, list, tuple, dict, set,
                                                 frozenset, type(None))}
_EXCEPTIONS = {name: value for name, value in vars(builtins).items()
               if isinstance(value, type) and issubclass(value, Exception)}
_BETWEEN_REMOTES = ("eq", "lt", "le", "gt", "ge", "add", "sub", "mul", "truediv")
_OPERATIONS = {
    "call": lambda function, *args, **kwargs: function(*args, **kwargs),
    "get": getattr, "set": setattr, "item": operator.getitem, "put": operator.setitem, "drop": operator.delitem,
    "len": len, "iter": iter, "next": next, "str": str, "repr": repr, "bool": bool,
    **{name: getattr(operator, name) for name in _BETWEEN_REMOTES},
}


class LinkLostError(BaseException):
    """The other process is gone, or does not keep to the protocol. No Exception: a test must not catch it."""


class Link:
    """Requests to the other process, and its requests to this one while ours are under way.

    The judge trusts nothing that it receives; is_judge turns on its refusals.
    """

    def __init__(self, read_end, write_end, is_judge):
        self._reader, self._writer = open(read_end, "rb"), open(write_end, "wb")
        self._is_judge = is_judge
        self._objects, self._numbers = [], {}
        self._remotes, self._tuples, self._exceptions = {}, {}, {}
        self.names_class = not is_judge
        self.is_lost = False

    def offer(self, value):
        """The number by which the other process knows an object of this one."""
        number = self._numbers.get(id(value))
        if number is None:
            number = self._numbers[id(value)] = len(self._objects)
            self._objects.append(value)  # which also keeps its id from being used again
        return number

    def request(self, operation, number, *args, **kwargs):
        """Do something to the other process's object of that number. Returns the result or raises what it raised."""
        self._send(["do", operation, number, [self._encode(value) for value in args],
                    {name: self._encode(value) for name, value in kwargs.items()}])
        while True:
            kind, *content = self._receive()
            if kind == "do":
                self._serve(*content)
            elif kind == "error":
                error = self._decode_exception(*content)
                # Out of a call it would end, in silence, the map or loop of a test that goes through the cases.
                if isinstance(error, StopIteration) and operation != "next":
                    error = RuntimeError("the answer raised StopIteration")
                    error.is_remote = True
                raise error
            else:
                result, changed = content
                for value, update in zip((*args, *kwargs.values()), changed, strict=False):
                    _update(value, self._decode(update))
                return self._decode(result)

    def serve(self):
        """Do what the other process requests, until it ends: then LinkLostError."""
        while True:
            _, *content = self._receive()
            self._serve(*content)

    def _serve(self, operation, number, args, kwargs):
        try:
            target = self._objects[number]
            if self._is_judge and not _may_be_asked(operation, target, args):
                raise TypeError(f"a test does not hand on {operation} of its {type(target).__name__}")
            values = [self._decode(value) for value in args]
            named = {name: self._decode(value) for name, value in kwargs.items()}
            result = _OPERATIONS[operation](target, *values, **named)
            # Of a class of the answer, even one derived from a plain type, a test wants the instance with its methods.
            is_instance = (operation == "call" and isinstance(target, type) and target.__module__ == _ANSWER
                           and not isinstance(result, tuple))
            result = ["mine", self.offer(result)] if is_instance else self._encode(result)
            changed = []
            if operation == "call":
                changed = [self._encode(value) for value in (*values, *named.values())]
                if changed == [*args, *kwargs.values()]:
                    changed = []
            reply = json.dumps(["done", result, changed])
        except LinkLostError:
            raise
        except BaseException as error:  # whatever the answer's code raises, SystemExit too, is its result
            names = [kind.__name__ for kind in type(error).__mro__]
            try:
                reply = json.dumps(["error", names, [self._encode(value) for value in error.args]])
            except Exception:
                reply = json.dumps(["error", names, []])
        self._send_text(reply)

    def _send(self, message):
        self._send_text(json.dumps(message))

    def _send_text(self, text):
        try:
            self._writer.write(_LENGTH.pack(len(text)) + text.encode())
            self._writer.flush()
        except OSError:
            raise self._lose() from None

    def _receive(self):
        head = self._reader.read(_LENGTH.size)
        if len(head) < _LENGTH.size:
            raise self._lose()
        size, = _LENGTH.unpack(head)
        text = self._reader.read(size)
        if len(text) < size:
            raise self._lose()
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise self._lose() from None

    def _lose(self):
        self.is_lost = True
        return LinkLostError()

    def _encode(self, value):
        kind = type(value)
        if kind in (type(None), bool, float, str):
            return value
        if kind is int:
            return value if -_LONG_INT < value < _LONG_INT else ["int", hex(value)]
        if kind is list or kind is tuple:
            return [kind.__name__, *map(self._encode, value)]
        if kind is dict:
            return ["dict", *(self._encode(part) for item in value.items() for part in item)]
        if kind is Remote:
            return ["yours", value._remote_number]
        origin = kind.__module__, kind.__qualname__
        if origin in _BUILT and kind is getattr(sys.modules[kind.__module__], kind.__qualname__, None):
            return ["built", *origin, *map(self._encode, _BUILT[origin](value))]
        if isinstance(value, type) or origin == ("builtins", "builtin_function_or_method"):
            if getattr(builtins, value.__name__, None) is value or value is type(None):
                return ["builtin", value.__name__]
            if isinstance(value, type) and issubclass(value, Exception):
                return ["exception", *(parent.__name__ for parent in value.__mro__)]
        elif isinstance(value, tuple) and hasattr(value, "_fields"):
            return ["named", kind.__name__, list(value._fields), *map(self._encode, value)]
        elif self._is_judge and hasattr(kind, "__next__") and kind.__module__ in ("builtins", "itertools"):
            return ["iterator", *map(self._encode, value)]
        for base, convert in _BASES:
            if isinstance(value, base):
                return self._encode(convert(value))
        return ["mine", self.offer(value)]

    def _decode(self, value):
        if type(value) is not list:
            return value
        tag, *content = value
        if tag == "list":
            return [self._decode(part) for part in content]
        if tag == "tuple":
            return tuple([self._decode(part) for part in content])
        if tag == "dict":
            parts = [self._decode(part) for part in content]
            return dict(zip(parts[::2], parts[1::2], strict=True))
        if tag == "int":
            return int(content[0], 16)
        if tag == "yours":
            return self._objects[content[0]]
        if tag == "mine":
            number = content[0]
            if number not in self._remotes:
                self._remotes[number] = Remote(self, number)
            return self._remotes[number]
        if tag == "built":
            module, name, *arguments = content
            if (module, name) not in _BUILT:
                raise TypeError(f"{module}.{name} does not travel as data")
            return getattr(importlib.import_module(module), name)(*[self._decode(part) for part in arguments])
        if tag == "named":
            name, fields, *parts = content
            key = (name, *fields)
            if key not in self._tuples:
                self._tuples[key] = collections.namedtuple(name, fields)
            # A field can have a method's name.
            return self._tuples[key](*[_as_method(self, self._decode(part)) for part in parts])
        if tag == "iterator":
            return iter([self._decode(part) for part in content])
        if tag == "exception":
            return self._exception_class(content)
        if tag == "builtin" and content[0] in _PLAIN_TYPES:
            return _PLAIN_TYPES[content[0]]
        if tag == "builtin" and not self._is_judge:
            return getattr(builtins, content[0])
        raise TypeError(f"{tag} does not travel as data")

    def _exception_class(self, names):
        """A class for the names of an exception's class and its parents: Python's own, or one made here."""
        found = Exception
        for name in reversed(names):
            if name in _EXCEPTIONS:
                found = _EXCEPTIONS[name]
            elif name not in ("object", "BaseException"):
                found = self._exceptions.setdefault(name, type(name, (found,), {}))
        return found

    def _decode_exception(self, names, args):
        kind = self._exception_class(names)
        args = [self._decode(value) for value in args]
        try:
            error = kind(*args)
        except TypeError:  # a class that wants other arguments, such as UnicodeDecodeError
            error = kind.__new__(kind)
        error.is_remote = True
        return error


class Remote:
    """Stands for an object of the other process."""

    def __init__(self, link, number, is_method=False):
        vars(self).update(_remote_link=link, _remote_number=number, _remote_is_method=is_method)

    def __call__(self, *args, **kwargs):
        if self._remote_is_method and (args or kwargs):
            raise TypeError("a result that is no plain data is not asked with arguments: the test names no class")
        return self._remote_link.request("call", self._remote_number, *args, **kwargs)

    def __getattr__(self, name):
        return _as_method(self._remote_link, self._remote_link.request("get", self._remote_number, name))

    def __eq__(self, other):
        if type(other) is not Remote:
            return False
        return (self._remote_number == other._remote_number
                or self._remote_link.request("eq", self._remote_number, other) is True)

    def __hash__(self):
        return self._remote_number


def _as_method(link, value):
    """What comes out of an object of the answer: it is asked with arguments only where the test names a class."""
    if link.names_class or not callable(value):
        return value
    if type(value) is not Remote:
        raise TypeError("a class does not travel as an attribute: bool in the place of startswith would always agree")
    return Remote(link, value._remote_number, is_method=True)


def _hand_on(operation):
    def ask(self, *args):
        return self._remote_link.request(operation, self._remote_number, *args)
    return ask


def _hand_on_between_remotes(operation):
    # Never with data: it could be the expected value, and the answer would say whether it is.
    def ask(self, other):
        if type(other) is not Remote:
            return NotImplemented
        return self._remote_link.request(operation, self._remote_number, other)
    return ask


for _name, _operation in (("setattr", "set"), ("getitem", "item"), ("setitem", "put"), ("delitem", "drop"),
                          ("len", "len"), ("iter", "iter"), ("next", "next"), ("str", "str"), ("repr", "repr"),
                          ("bool", "bool")):
    setattr(Remote, f"__{_name}__", _hand_on(_operation))
for _operation in _BETWEEN_REMOTES[1:]:
    setattr(Remote, f"__{_operation}__", _hand_on_between_remotes(_operation))


def _may_be_asked(operation, target, args):
    """Whether the judge lets the answer do this to an object that a test handed over: calls of what it can call, and
    the public attributes and items of instances of the test's own classes."""
    if operation == "call":
        return True
    is_private = operation in ("get", "set") and str(args[0]).startswith("_")
    return type(target).__module__ == _TEST and not is_private


def _update(value, update):
    """Make value equal to update in place, and so its parts; returns value, or update where that cannot be done."""
    if type(value) is not type(update):
        return update
    if isinstance(value, list):
        value[:] = [*map(_update, value, update), *update[len(value):]]
    elif isinstance(value, dict):
        parts = {key: _update(value[key], part) if key in value else part for key, part in update.items()}
        value.clear()
        value.update(parts)
    elif isinstance(value, set):
        value.clear()
        value.update(update)
    elif isinstance(value, (bytearray, collections.deque)):
        value.clear()
        value.extend(update)
    elif isinstance(value, tuple):
        for part, part_update in zip(value, update, strict=False):
            _update(part, part_update)
    else:
        return update
    return value


def serve_answer(read_end, write_end):
    """The answer's process: its code comes on standard input."""
    source = sys.stdin.buffer.read().decode("utf-8", "surrogatepass")
    _silence(0)
    module = ModuleType(_ANSWER)
    sys.modules[_ANSWER] = module
    compiled = []

    def compile_source():
        compiled.append(compile(source, "<answer>", "exec"))

    def run():
        exec(compiled.pop(), vars(module))

    def find(names):
        return {name: getattr(module, name) for name in names if hasattr(module, name)}

    link = Link(read_end, write_end, is_judge=False)
    for function in (compile_source, run, find):
        link.offer(function)
    try:
        link.serve()
    except LinkLostError:
        os._exit(0)  # at once, whatever threads and exit functions the answer has left


def judge_tests(read_end, write_end):
    """The judge's process. Standard input: JSON list of {"text", "names" left to the answer, "modules" to import}."""
    tests = json.loads(sys.stdin.buffer.read())
    verdicts = os.dup(1)
    _silence(1, 2)
    link = Link(read_end, write_end, is_judge=True)
    for stage, number in zip(STAGES, (COMPILE, RUN), strict=True):
        verdict = _verdict(link, lambda number=number: link.request("call", number))
        if number == COMPILE and verdict not in (PASSED, LOST):
            verdict = "syntax_error"
        os.write(verdicts, f"{stage if verdict == PASSED else verdict}\n".encode())
        if verdict != PASSED:
            os._exit(0)  # like serve_answer's
    for test in tests:
        verdict = _verdict(link, lambda test=test: _run_test(link, **test))
        os.write(verdicts, f"{verdict}\n".encode())
        if verdict == LOST:
            break
    os._exit(0)


def _run_test(link, text, names, modules):
    module = ModuleType(_TEST)
    sys.modules[_TEST] = module
    vars(module).update({name: importlib.import_module(name) for name in modules})
    link.names_class = any(name[0].isupper() for name in names)
    found = link.request("call", FIND, names)
    vars(module).update({name: found[name] for name in names if name in found})  # and nothing else that it may send
    exec(compile(text, "<test>", "exec"), vars(module))


def _verdict(link, action):
    """PASSED if the action returns, else why it did not."""
    verdict = PASSED
    try:
        action()
    except SystemExit as end:  # of the test: the answer's comes as another class
        verdict = PASSED if end.code in (None, 0) else "wrong_answer"
    except MemoryError:
        verdict = "memory"
    except BaseException as error:  # a test may raise anything, and all of it means that it failed
        verdict = "runtime_error" if getattr(error, "is_remote", False) else "wrong_answer"
    return LOST if link.is_lost else verdict


def _silence(*descriptors):
    nothing = os.open("/dev/null", os.O_RDWR)
    for descriptor in descriptors:
        os.dup2(nothing, descriptor)
    os.close(nothing)
