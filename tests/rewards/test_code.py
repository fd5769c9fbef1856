"""Oracle: published problems with their reference solutions, hand-written answers, and answers that try to cheat."""

import gzip
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindpangu.data.documents import Example
from mindpangu.rewards.code import REASONS, CodeVerifier, extract_code
from mindpangu.rewards.sandbox import describe_isolation
from mindpangu.rewards.score import Response

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
ISOLATED = not describe_isolation().missing
needs_sandbox = pytest.mark.skipif(not ISOLATED, reason="this machine cannot isolate programs")


@pytest.fixture(scope="module")
def verifier():
    return CodeVerifier(timeout_s=20)


@pytest.fixture(scope="module")
def hasty():
    return CodeVerifier(timeout_s=3)


@pytest.mark.parametrize(("text", "code"), [
    ("```python\ndef f(): pass\n```", "def f(): pass\n"),
    ("Try:\n```python\na = 1\n```\nno,\n```python\na = 2\n```\nDone.", "a = 2\n"),
    ("```py\na = 1\n```\nwhich prints\n```\n1\n```", "a = 1\n"),
    ("```\na = 1\n```\nor\n```\na = 2\n```", "a = 2\n"),
    ("~~~python\na = '```'\n~~~", "a = '```'\n"),
    ("````python\n'''\n```\n'''\n````", "'''\n```\n'''\n"),
    ("```Python3\na = 1\n```   ", "a = 1\n"),
    ("``` {.python}\na = 1\n```", "a = 1\n"),
    ("1. So:\n   ```python\n   if a:\n       b\n   ```\n", "if a:\n    b\n"),
    ("Here:\n```python\na = 1\nb = 2", "a = 1\nb = 2\n"),
    ("```python\r\na = 1\r\n```\r\n", "a = 1\r\n"),
    ("```python\na = 1\n```\n```python\n\n```", "a = 1\n"),
    ("import math\nprint(math.pi)", "import math\nprint(math.pi)"),
    ("def f(x):\n    return x", "def f(x):\n    return x"),
    ("```ls```", None),
    ("The answer is 4.", None),
    ("```python\n```", None),
    ("", None),
])
def test_the_last_python_block_is_the_code(text, code):
    assert extract_code(text) == code


def test_extracting_from_a_million_hostile_characters_is_quick():
    started = time.perf_counter()
    for unit in ("`", "~~~\n", "```python\n", " ", "```", "\n", "def ", "import \n", "{.}"):
        extract_code(unit * (1_000_000 // len(unit)))
    assert time.perf_counter() - started < 10  # quadratic time takes hours


ADD = ("assert add(1, 2) == 3", "assert add(-1, 1) == 0", "assert add('a', 'b') == 'ab'", "assert add(0.5, 1) == 1.5")


@needs_sandbox
def test_the_value_is_the_share_of_tests_that_pass(verifier):
    right = verifier.run_tests("def add(a, b):\n    return a + b", ADD)
    assert right == (1.0, {"correct": 1.0, "compiled": 1.0, "ran": 1.0, "passed": 1.0}, "correct")
    ints = verifier.run_tests("def add(a, b):\n    return int(a) + int(b)", ADD)
    assert ints == (0.5, {"correct": 0.0, "compiled": 1.0, "ran": 1.0, "passed": 0.5}, "runtime_error")
    wrong = verifier.run_tests("def add(a, b):\n    return a", ADD)
    assert wrong == (0.0, {"correct": 0.0, "compiled": 1.0, "ran": 1.0, "passed": 0.0}, "wrong_answer")


@needs_sandbox
def test_an_answer_is_scored_by_the_code_in_it(verifier):
    problem = Example((), tests=ADD, task_type="code")
    answer = "I add them:\n```python\ndef add(a, b):\n    return a + b\n```\nThat is all."
    assert verifier.score(problem, Response(answer)).value == 1.0
    nothing = {"correct": 0.0, "compiled": 0.0, "ran": 0.0, "passed": 0.0}
    assert verifier.score(problem, Response("I do not know.")) == (0.0, nothing, "no_code")


@needs_sandbox
@pytest.mark.parametrize(("code", "reason", "stages"), [
    ("def add(a, b:", "syntax_error", 0),
    ("add = [" + "[" * 100_000 + "]" * 100_000 + "]", "syntax_error", 0),
    ("add = " + "-" * 100_000 + "1", "syntax_error", 0),
    ("def add(a, b): return a\0+ b", "syntax_error", 0),
    ("def add(a, b): return '\ud800'", "syntax_error", 0),
    ("return 1", "syntax_error", 0),
    ("x = 1 / 0", "runtime_error", 1),
    ("import numpy_of_nobody", "runtime_error", 1),
    ("x = input()", "runtime_error", 1),
    ("raise SystemExit(0)", "runtime_error", 1),
    ("import os; os._exit(0)", "runtime_error", 1),
    ("import ctypes; ctypes.string_at(0)", "killed", 1),
    ("import os\nwhile True: os.fork()", "runtime_error", 1),
    ("x = bytearray(10**9)", "memory", 1),
    ("x = 'ab' * 10**9\nx = x.encode() * 2", "memory", 1),
    ("while True: pass", "timeout", 1),
    ("import time; time.sleep(100)", "timeout", 1),
    ("import threading\ndef spin():\n    while True: pass\nt = threading.Thread(target=spin)\nt.start()\nt.join()",
     "timeout", 1),
    ("while True: print('x' * 10**6)", "output_limit", 1),
    ("def add(a, b): return a + c", "runtime_error", 2),
    ("def add(a, b): return add(a, b)", "runtime_error", 2),
    ("def add(a, b): raise SystemExit(0)", "runtime_error", 2),
    ("def add(a, b):\n    import os\n    os._exit(0)", "runtime_error", 2),
    ("def add(a, b):\n    import os, signal\n    os.kill(os.getpid(), signal.SIGSEGV)", "wrong_answer", 2),
    ("def add(a, b):\n    while True: pass", "timeout", 2),
    ("def add(a, b): return [0] * 10**9", "memory", 2),
    ("def add(a, b):\n    while True: print('x' * 10**6)", "output_limit", 2),
    ("def sub(a, b): return a + b", "wrong_answer", 2),
    ("add = 3", "wrong_answer", 2),
])
def test_the_reason_says_what_went_wrong(verifier, hasty, code, reason, stages):
    if "SIGSEGV" in code and not describe_isolation().namespaces:
        reason = "killed"  # the first process of a namespace is deaf to its own signals
    score = (hasty if reason == "timeout" else verifier).run_tests(code, ADD[:1])
    assert score == (0.0, {"correct": 0.0, "compiled": float(stages >= 1), "ran": float(stages >= 2), "passed": 0.0},
                     reason)


@needs_sandbox
def test_recursion_without_a_limit_ends_in_some_limit(hasty):
    deep = "import sys\nsys.setrecursionlimit(10**9)\ndef add(a, b): return add(a, b + 1)"
    score = hasty.run_tests(deep, ADD)
    assert score.value == 0.0 and score.reason in ("memory", "timeout", "killed", "runtime_error")


@needs_sandbox
def test_a_huge_source_is_read(verifier):
    code = "x = [" + "1,\n" * 200_000 + "]\ndef add(a, b): return a + b"
    assert verifier.run_tests(code, ADD).value == 1.0


@needs_sandbox
def test_tests_before_a_hang_count(hasty):
    code = "def add(a, b):\n    while a < 0: pass\n    return a + b"
    score = hasty.run_tests(code, ADD)
    assert (score.value, score.reason) == (0.25, "timeout")


# Each is right about nothing, and would pass where answer and test share an interpreter or an exit code.
CHEATS = {
    "exits in success": "import sys\nsys.exit(0)",
    "exits at once in success": "import os\nos._exit(0)",
    "exits in the call": "import os\ndef add(a, b): os._exit(0)",
    "replaces the process": "import os\nos.execv('/bin/true', ['true'])",
    "exits at exit": "import atexit, os\natexit.register(os._exit, 0)\ndef add(a, b): raise SystemExit",
    "equals everything": "class Any:\n    def __eq__(self, other): return True\ndef add(a, b): return Any()",
    "equals everything as a number": "class Any(int):\n    def __eq__(self, other): return True\n"
                                     "def add(a, b): return Any(7)",
    "equals everything as text": "class Any(str):\n    def __eq__(self, other): return True\n"
                                 "def add(a, b): return Any()",
    "is the class": "class add:\n    def __new__(cls, a, b): return super().__new__(cls)\n"
                    "    def __eq__(self, other): return True",
    "equals everything by its metaclass": "class Meta(type):\n    def __eq__(cls, other): return True\n"
                                          "class Any(metaclass=Meta): pass\ndef add(a, b): return Any",
    "removes assert": "import builtins\nclass AssertionError(Exception):\n    def __new__(cls, *a): sys.exit(0)\n"
                      "builtins.AssertionError = AssertionError\ndef add(a, b): return None",
    "removes exceptions": "import sys\nsys.excepthook = lambda *a: None\ndef add(a, b): return None",
    "skips lines": "import sys\ndef trace(frame, event, arg):\n    frame.f_trace_opcodes = True\n    return trace\n"
                   "sys.settrace(trace)\ndef add(a, b): return None",
    "changes the caller": "import sys\ndef add(a, b):\n    frame = sys._getframe()\n    while frame:\n"
                          "        frame.f_globals['add'] = frame.f_locals['verdict'] = 'correct'\n"
                          "        frame.f_globals['__builtins__'] = {}\n        frame = frame.f_back",
    "prints the verdicts": "print('compiled\\nran\\ncorrect\\ncorrect\\ncorrect\\ncorrect', flush=True)\nimport os\n"
                           "for fd in range(64):\n    try: os.write(fd, b'compiled\\nran\\ncorrect\\n' * 9)\n"
                           "    except OSError: pass",
    "patches the harness": "import code_harness, json, operator\n"
                           "for name in list(vars(code_harness)):\n"
                           "    if name[:2] != '__' and callable(getattr(code_harness, name)):\n"
                           "        setattr(code_harness, name, lambda *a, **k: 'correct')\n"
                           "code_harness.PASSED = json.dumps = json.loads = lambda *a, **k: '[]'\n"
                           "def add(a, b): return None",
    "speaks the protocol": "import json, os, struct\n"
                           "def send(message):\n    text = json.dumps(message).encode()\n"
                           "    os.write(4, struct.pack('>I', len(text)) + text)\n"
                           "for value in (None, True, ['mine', 0], ['yours', 0], ['builtin', 'eval'], ['list'],\n"
                           "              ['built', 'os', 'system', 'true'], ['dict', '__builtins__', ['dict']]):\n"
                           "    send(['done', value, []])\n"
                           "send(['do', 'call', 0, [], {}])\nsend(['do', 'get', 0, ['__globals__'], {}])\n"
                           "send('correct')\nsend(['error', ['SystemExit', 'BaseException'], [0]])\n"
                           "def add(a, b): return None",
    "raises what ends a program in success": "def add(a, b):\n    error = type('SystemExit', (SystemExit,), {})\n"
                                             "    raise error(0)",
    "gives more names than were asked for": "import builtins\nabs = len = str = lambda *a: 3\n"
                                            "builtins.__build_class__ = None\ndef add(a, b): return None",
}


@needs_sandbox
@pytest.mark.parametrize("cheat", CHEATS)
def test_no_answer_talks_its_way_to_a_verdict(verifier, cheat):
    score = verifier.run_tests(CHEATS[cheat], ADD)
    # "memory": text where the protocol has a length makes the judge wait for a very long message.
    assert score.value == 0.0 and score.reason in ("runtime_error", "wrong_answer", "memory")


@needs_sandbox
@pytest.mark.parametrize(("code", "test"), [
    # A universal answer of a class whose every method agrees.
    ("class Yes:\n    def __getattr__(self, name): return lambda *a: True\n"
     "    def __contains__(self, item): return True\n    def __sub__(self, other): return 0\n"
     "    __rsub__ = __abs__ = __lt__ = __gt__ = __ge__ = __le__ = __ne__ = __contains__\n"
     "def f(x): return Yes()", test) for test in (
        "assert f(1).startswith('x')", "assert 5 in f(1)", "assert f(1) > 3", "assert abs(f(1) - 2.5) < 1e-6",
        "assert 2.5 - f(1) == 0", "assert f(1) == 5", "assert 5 == f(1)", "assert f(1) in (5, 6)",
        "assert f(1).count('a') == True", "assert [f(1)] == [5]", "assert {f(1)} == {5}")
] + [
    ("import collections\nR = collections.namedtuple('R', ['startswith'])\ndef f(x): return R(lambda text: True)",
     "assert f(1).startswith('x')"),
    ("import collections\nR = collections.namedtuple('R', ['startswith'])\ndef f(x): return R(bool)",
     "assert f(1).startswith('x')"),
    ("class R: startswith = bool\ndef f(x): return R()", "assert f(1).startswith('x')"),
    ("class R: get = str\ndef f(x): return R()", "assert f(1).get('a') == 'a'"),
    ("def f(g):\n    class R: startswith = g\n    return R()", "assert f(lambda x: x).startswith('x')"),
    ("abs = lambda x: 0\ndef f(x): return 9.0", "assert abs(f(1) - 2.5) < 1e-6"),
    ("all = any = lambda *a: True\ndef f(x): return 9", "assert all(f(i) == i for i in range(3))"),
    ("set = sorted = lambda x: 1\ndef f(x): return 9", "assert set([f(1)]) == set([1])"),
    ("class math:\n    isclose = lambda *a: True\ndef f(x): return 9.0", "assert math.isclose(f(1), 2.5)"),
    ("def f(x): raise StopIteration", "assert all(map(lambda case: f(case) == case, [1, 2, 3]))"),
    ("def f(x):\n    x.clear()\n    return []", "given = [3, 1]; result = f(given); assert result == [1, 3]"),
    ("def f(x): raise ValueError", "try: f(1); assert False\nexcept KeyError: pass"),
    ("def f(x): return x", "if __name__ == '__main__': assert f(1) == 2"),
    ("def f(x): return 9", "import unittest\nclass Test(unittest.TestCase):\n"
                           "    def test_f(self): self.assertEqual(f(1), 2)\nunittest.main()"),
    ("import os\ndef f(x): os._exit(0)", "try: f(1)\nexcept BaseException: pass"),
    ("def f(g): return g.__globals__['secret']", "secret = 'abc'\ndef g(): pass\nassert f(g) == secret"),
    ("def f(n): return n.__init__.__globals__['secret']", "secret = 'abc'\nclass N:\n"
                                                         "    def __init__(self): pass\nassert f(N()) == secret"),
    ("def f(n): return n._secret", "class N: _secret = 'abc'\nassert f(N()) == 'abc'"),
    ("def f(g): g.__globals__['secret'] = 1; return 1", "secret = 'abc'\ndef g(): pass\nassert f(g) == secret"),
    # The harness on the answer's side, changed so that it hands over a name which nobody asked for.
    ("import json\nhonest = json.dumps\ndef dumps(message):\n"
     "    if message[0] == 'done' and str(message[1])[:7] == \"['dict'\": message[1] += ['all', ['builtin', 'bool']]\n"
     "    return honest(message)\njson.dumps = dumps\ndef f(x): return 9", "assert all(f(i) == i for i in range(3))"),
])
def test_what_a_test_checks_is_not_the_answers_to_say(verifier, code, test):
    assert verifier.run_tests(code, (test,)).value == 0.0


@needs_sandbox
def test_an_answer_finds_no_expected_value(verifier):
    # Whatever it can reach: frames, every object alive, its descriptors, its files, its parent.
    code = """
import gc, os, sys
def f(x):
    places = []
    frame = sys._getframe()
    while frame:
        places += [repr(frame.f_locals), repr(frame.f_globals)]
        frame = frame.f_back
    places += [repr(thing)[:10**6] for thing in gc.get_objects()]
    for descriptor in (0, 5, 6, 7, 8):
        try: places.append(os.pread(descriptor, 10**6, 0).decode("latin-1"))
        except OSError: pass
    for folder, _, names in os.walk("/tmp"):
        places += [open(os.path.join(folder, name)).read() for name in names]
    for path in ("/proc/1/cmdline", "/proc/self/environ", "/proc/self/mem"):
        try: places.append(open(path, "rb").read(10**6).decode("latin-1"))
        except OSError: pass
    found = [place for place in places if "the secret is " in place]
    return found[0].split("the secret is ")[1][:6] if found else None
def control(x):
    local = "the secret is " + x
    return f(x)
"""
    secret = f"assert f(1) == 'the secret is {os.urandom(3).hex()}'[-6:]"
    assert verifier.run_tests(code, (secret,)).value == 0.0
    assert verifier.run_tests(code, ("assert control('abcdef') == 'abcdef'",)).value == 1.0


@needs_sandbox
@pytest.mark.parametrize(("code", "test"), [
    ("def f(x): return x", f"for value in ({values}): assert f(value) == value and type(f(value)) is type(value)")
    for values in (
        "None, True, False, 0, -1, 10**5000, -10**5000, 0.1, -0.0, 1e308, float('inf'), 3+4j",
        "'', 'grüße', '\\ud800', 'a\\0b', b'\\x00\\xff', bytearray(b'ab'), range(1, 9, 2)",
        "[], [1, [2.0, ['3']]], (), (1,), ((1, 2), [3]), {}, {1: 2}, {(1, 2): [3]}, {1, 2}, frozenset({1})",
        "*__import__('collections').Counter('aab').items(), __import__('collections').deque([1, 2], 5)",
        "__import__('collections').Counter('aab'), __import__('collections').OrderedDict([(2, 1), (1, 2)])",
        "__import__('decimal').Decimal('1.10'), __import__('fractions').Fraction(1, 3), int, str, list",
        "__import__('datetime').date(2024, 2, 29), __import__('datetime').datetime(2024, 1, 2, 3, 4, 5, 6), "
        "__import__('datetime').timedelta(1, 2, 3)",
    )
] + [
    ("def f(x): return x", "import math; assert math.isnan(f(float('nan'))) and math.copysign(1, f(-0.0)) == -1"),
    ("def f(x): return x", "assert list(f({2: 0, 1: 0})) == [2, 1]"),
    ("def f(x): return x != x", "assert f(float('nan'))"),
    ("def f(*args, **kwargs): return args, kwargs", "assert f(1, [2], a=(3,)) == ((1, [2]), {'a': (3,)})"),
    ("def f(x): x.sort()", "given = [3, 1, 2]; alias = given; assert f(given) is None and alias == [1, 2, 3]"),
    ("def f(grid): grid[0][0] = 5", "row = [1, 2]; f([row, [3]]); assert row == [5, 2]"),
    ("def f(d, s): d['b'] = s.pop(); s.add(9)", "d, s = {}, {2}; f(d, s); assert (d, s) == ({'b': 2}, {9})"),
    ("def f(x):\n    if x < 0: raise ValueError('negative', x)\n    return x",
     "try: f(-1); assert False\nexcept ValueError as error: assert error.args == ('negative', -1)"),
    ("class TooBig(ValueError): pass\nclass FarTooBig(TooBig): pass\ndef f(x): raise FarTooBig('no')",
     "try: f(1); assert False\nexcept TooBig as error: assert isinstance(error, ValueError) and str(error) == 'no'"),
    ("def f(n):\n    for i in range(n): yield i * i", "assert list(f(4)) == [0, 1, 4, 9] and sum(f(3)) == 5"),
    ("def f():\n    n = 0\n    while True:\n        yield n\n        n += 1",
     "g = f(); assert [next(g), next(g), next(g)] == [0, 1, 2]"),
    ("def f(text): return map(str.upper, text)", "assert ''.join(f('abc')) == 'ABC'"),
    ("def f(xs): return {x: None for x in xs}.keys()", "assert set(f('aab')) == {'a', 'b'} and 'a' in f('ab')"),
    ("def f(n):\n    return lambda m: n + m", "assert f(2)(3) == 5"),
    ("def f(g, xs): return [g(x) for x in xs]", "assert f(lambda x: x + 1, [1, 2]) == [2, 3] and f(abs, [-1]) == [1]"),
    ("def f(xs): return sum(xs)", "assert f(x for x in [1, 2]) == 3 and f(iter([4])) == 4 and f(range(4)) == 6"),
    ("import collections\nPoint = collections.namedtuple('Point', 'x y')\ndef f(a): return Point(a, 1)",
     "assert f(3) == (3, 1) and f(3).x == 3 and Point(1, 2).y == 2"),
    ("import enum\nclass Color(enum.IntEnum):\n    RED = 1\ndef f(): return Color.RED", "assert f() == 1"),
    ("import functools\n@functools.lru_cache\ndef f(n): return n if n < 2 else f(n - 1) + f(n - 2)",
     "assert f(80) == 23416728348467685"),
    ("import dataclasses\n@dataclasses.dataclass\nclass P:\n    x: int\n    def add(self, n): return P(self.x + n)",
     "assert P(1).add(2).x == 3 and P(1) == P(1) and P(1) != P(2) and 'x=1' in repr(P(1))"),
    ("class Stack(list):\n    def push(self, x): self.append(x)\n    def size(self): return len(self)",
     "s = Stack(); s.push(4); s.push(5); assert s.pop() == 5 and s.size() == 1 and s[0] == 4 and len(s) == 1 and s"),
    ("class V:\n    def __init__(self, x): self.x = x\n    def __add__(self, o): return V(self.x + o.x)\n"
     "    def __eq__(self, o): return self.x == o.x\n    def __lt__(self, o): return self.x < o.x",
     "assert V(1) + V(2) == V(3) and V(1) < V(2) and max(V(1), V(5)).x == 5"),
    ("class Node:\n    def __init__(self, v): self.v, self.left = v, None\n"
     "def depth(n): return 0 if n is None else 1 + depth(n.left)",
     "root, leaf = Node(1), Node(2); root.left = leaf; assert depth(root) == root.left.v == 2 and root.left is leaf"),
    ("def depth(n): return 0 if n is None else 1 + depth(n.next)",
     "class N:\n    def __init__(self, next=None): self.next = next\nassert depth(N(N())) == 2"),
    ("def f(n): n.value = 7", "class N: value = 1\nn = N(); f(n); assert n.value == 7"),
    ("def deco(g):\n    def inner(*a): return g(*a) * 2\n    return inner",
     "@deco\ndef three(): return 3\nassert three() == 6"),
    ("def sum(a, b): return a * b", "assert sum(2, 5) == 10"),
    ("import math\ndef f(x): return math.sqrt(x)", "assert math.isclose(f(2) ** 2, 2)"),
    ("copy = lambda x: x * 2", "assert copy(4) == 8"),
    ("LIMIT = [1, 2]\ndef f(): return LIMIT", "assert f() == LIMIT and len(LIMIT) == 2"),
    ("def f(x): return x + 1\nif __name__ == '__main__':\n    print(f(int(input())))", "assert f(1) == 2"),
    ("def f(x):\n    print(x, 'on the way')\n    return x", "assert f(1) == 1"),
    ("def f(path):\n    with open(path, 'w') as file: file.write('hello')",
     "f('a.txt'); assert open('a.txt').read() == 'hello'"),
    ("def f(x): return x", "import unittest\nclass Test(unittest.TestCase):\n"
                           "    def test_f(self): self.assertEqual(f(1), 1)\nunittest.main()"),
    ("import threading\nfor _ in range(3): threading.Thread(target=lambda: [0 for _ in iter(int, 1)]).start()\n"
     "def f(x): return x", "assert f(1) == 1"),
])
def test_honest_answers_pass(verifier, code, test):
    if "open(path" in code and not describe_isolation().namespaces:
        pytest.skip("programs have no files of their own here")
    assert verifier.run_tests(code, (test,)) == (
        1.0, {"correct": 1.0, "compiled": 1.0, "ran": 1.0, "passed": 1.0}, "correct")


def test_broken_problems_are_refused_at_the_start():
    verifier = CodeVerifier(allow_unsafe=True)
    verifier.check(Example((), tests=ADD))
    for tests, message in (((), "tests is empty"), (("assert f(1",), "no Python program"), (("a\0b",), "no Python"),
                           ((*ADD, "assert 1 == 1"), r"tests\[4\].*no name"),
                           (("def test_f():\n    pass",), "no name")):
        with pytest.raises(ValueError, match=message):
            verifier.check(Example((), tests=tests))


@needs_sandbox
@settings(max_examples=15, deadline=None)
@given(st.text(st.characters(codec=None), max_size=80), st.booleans())
def test_any_text_gets_a_score(verifier, text, fenced):
    answer = f"```python\n{text}\n```" if fenced else "import os\n" + text
    score = verifier.score(Example((), tests=ADD), Response(answer))
    assert score.value == 0.0 and score.reason in REASONS


@needs_sandbox
def test_many_threads_may_score_at_once():
    verifier = CodeVerifier(num_workers=3)
    problem = Example((), tests=("assert f(1) == 7",))
    most, running, lock = 0, 0, threading.Lock()
    run = verifier._sandbox.run

    def watched(*programs):
        nonlocal most, running
        with lock:
            running += 1
            most = max(most, running)
        outcome = run(*programs)
        with lock:
            running -= 1
        return outcome

    verifier._sandbox.run = watched
    answers = [Response(f"def f(x): return {number}") for number in range(16)]
    with ThreadPoolExecutor(8) as threads:
        scores = list(threads.map(lambda answer: verifier.score(problem, answer), answers))
    assert [score.value for score in scores] == [float(number == 7) for number in range(16)]
    assert most == 3


def published_problems(name):
    """(problem's name, reference solution, tests) of each problem in a published file."""
    if name == "humaneval":
        with gzip.open(DATA / "humaneval/HumanEval.jsonl.gz", "rt") as file:
            rows = [json.loads(line) for line in file]
        return [(row["task_id"], row["prompt"] + row["canonical_solution"],
                 (f"{row['test']}\ncheck({row['entry_point']})\n",)) for row in rows]
    if name == "mbpp":
        rows = [json.loads(line) for line in (DATA / "mbpp/mbpp.jsonl").read_text().splitlines()]
        return [(row["task_id"], row["code"], tuple(f"{row['test_setup_code']}\n{test}" for test in
                                                    row["test_list"] + row["challenge_test_list"])) for row in rows]
    rows = json.loads((DATA / "mbpp/sanitized-mbpp.json").read_text())
    return [(row["task_id"], row["code"], tuple("\n".join([*row["test_imports"], test]) for test in row["test_list"]))
            for row in rows]


def check_published(name, size, step):
    problems = published_problems(name)
    assert len(problems) == size
    verifier = CodeVerifier(timeout_s=60)  # the slowest reference solution takes 5 s of one idle core
    # The next problem's solution defines other names, or does something else.
    pairs = [(problem, problems[(index + 1) % size]) for index, problem in enumerate(problems)][::step]
    with ThreadPoolExecutor(2) as threads:
        right = threads.map(lambda pair: verifier.run_tests(pair[0][1], pair[0][2]), pairs)
        wrong = threads.map(lambda pair: verifier.run_tests(pair[1][1], pair[0][2]), pairs)
        assert {pair[0][0]: score.reason for pair, score in zip(pairs, right, strict=True) if score.value != 1.0} == {}
        return {pair[0][0]: score.reason for pair, score in zip(pairs, wrong, strict=True) if score.value != 0.0}


@needs_sandbox
@pytest.mark.skipif(not DATA.is_dir(), reason="the published problems are not at hand")
@pytest.mark.parametrize(("name", "size", "step"), [("humaneval", 164, 5), ("mbpp_sanitized", 427, 12)])
def test_reference_solutions_pass_and_those_of_other_problems_fail(name, size, step):
    assert check_published(name, size, step) == {}


@needs_sandbox
@pytest.mark.long
@pytest.mark.skipif(not DATA.is_dir(), reason="the published problems are not at hand")
@pytest.mark.parametrize(("name", "size"), [("humaneval", 164), ("mbpp_sanitized", 427), ("mbpp", 974)])
def test_every_reference_solution_passes_and_those_of_other_problems_fail(name, size):
    assert check_published(name, size, step=1) == {}
