"""Verify an answer's Python code by tests: extract, compile, run, then each test; nothing of it runs in this process.

How a verdict is kept out of the answer's reach: code_harness.py. What keeps the machine out of its reach: sandbox.py.
"""

import ast
import builtins
import functools
import json
import re
import symtable
import sys
import threading
import warnings

from mindpangu.rewards import code_harness, sandbox_child
from mindpangu.rewards.sandbox import Program, Sandbox
from mindpangu.rewards.score import Score

REASONS = ("correct", "wrong_answer", "no_code", "syntax_error", "runtime_error", "timeout", "memory", "output_limit",
           "killed", "sandbox_error")
_FENCE = re.compile(r"([ \t]*)(`{3,}|~{3,})(.*)")
_PYTHON = ("python", "python3", "py", "py3")
_LOOKS_LIKE_CODE = re.compile(r"^(?:(?:async +)?def +\w|class +\w|import +\w|from +[\w.]+ +import\b)", re.MULTILINE)
_JUDGE, _ANSWER = (f"import code_harness; code_harness.{role}({sandbox_child.LINK_IN}, {sandbox_child.LINK_OUT})"
                   for role in ("judge_tests", "serve_answer"))


def extract_code(text):
    """The last block fenced as Python, else the last fenced block, else the text itself if a line begins like code.

    Fences are ``` or ~~~; one that is not closed ends with the text. None if there is no code.
    """
    blocks = []  # (is Python, lines)
    opening = None
    for line in text.split("\n"):
        fence = _FENCE.fullmatch(line.rstrip())
        if opening is None:
            if fence and "`" not in fence[3]:
                opening = fence
                label = fence[3].split()[:1] or [""]
                blocks.append((label[0].strip("{.}").lower() in _PYTHON, []))
        elif fence and fence[2].startswith(opening[2]) and not fence[3]:
            opening = None
        else:
            blocks[-1][1].append(line.removeprefix(opening[1]))
    blocks = [(is_python, "\n".join(lines) + "\n") for is_python, lines in blocks if any(map(str.strip, lines))]
    if blocks:
        return ([block for is_python, block in blocks if is_python] or [blocks[-1][1]])[-1]
    return text if _LOOKS_LIKE_CODE.search(text) else None


class CodeVerifier:
    """Runs the tests of a problem on answers, up to num_workers at a time; score may be called from any thread.

    timeout_s: wall clock for an answer's code and all tests together. memory_mib: address space of each process.
    max_processes: processes and threads of an answer. max_output_kib: what it may write to standard output and error.
    Tests after one that exhausts a limit or ends the answer's process count as failed.
    Raises ValueError where this machine cannot isolate programs, unless allow_unsafe; .isolation says what it has.
    """

    def __init__(self, timeout_s=10.0, memory_mib=512, max_output_kib=256, max_processes=8, num_workers=2,
                 allow_unsafe=False, isolation=None):
        self._sandbox = Sandbox(timeout_s, memory_mib, max_output_kib, max_processes, allow_unsafe,
                                preload=[code_harness], isolation=isolation)
        self.isolation = self._sandbox.isolation
        self._workers = threading.BoundedSemaphore(num_workers)

    def close(self):
        """Like other verifiers'; nothing outlives a call here."""

    def check(self, problem):
        """Raise ValueError if the problem has no tests, or one that is no Python or does not use the answer."""
        check_tests(problem.tests)

    def score(self, problem, response):
        """Score of the code in response.content by the problem's tests; see run_tests."""
        code = extract_code(response.content)
        if code is None:
            return _score("no_code", 0, len(problem.tests), num_stages=0)
        return self.run_tests(code, problem.tests)

    def run_tests(self, code, tests):
        """value, and parts["passed"]: the share of tests that pass; parts "correct", "compiled", "ran": 1.0 or 0.0.

        The reason, one of REASONS, is that of the first stage or test that failed. Raises ValueError for broken tests.
        """
        if not tests:
            raise ValueError("tests is empty: expected at least one test program.")
        plans = json.dumps([_plan(test) for test in tests]).encode()
        with self._workers:
            outcome = self._sandbox.run(Program(_JUDGE, plans, max_output_kib=1 + len(tests)),
                                        Program(_ANSWER, code.encode("utf-8", "surrogatepass")))
        if outcome.reason == "sandbox_error":
            warnings.warn(f"the sandbox failed, answers score 0: {outcome.complaint}", stacklevel=2)
            return _score("sandbox_error", 0, len(tests), num_stages=0)
        words = outcome.outputs[0].decode().split()
        expected = [*code_harness.STAGES, *[code_harness.PASSED] * len(tests)]
        reason = "correct"
        for index, word in enumerate(expected):
            if words[index:index + 1] != [word]:
                reason = words[index] if index < len(words) else outcome.reason
                break
        if reason in (code_harness.LOST, "ended"):  # "ended": the judge itself, by what a result or a test did to it
            ended = outcome.exit_codes[1 if reason == code_harness.LOST else 0]
            reason = "killed" if ended is not None and ended < 0 else "runtime_error"
        num_stages = sum(word in code_harness.STAGES for word in words)
        return _score(reason, words.count(code_harness.PASSED), len(tests), num_stages)


def check_tests(tests):
    """Raise ValueError for no tests, or one that is no Python or does not use the answer. Runs none of them."""
    if not tests:
        raise ValueError("tests is empty: a code problem needs at least one test program.")
    for index, test in enumerate(tests):
        if not _plan(test)["names"]:
            raise ValueError(f"tests[{index}]={test!r:.80} uses no name that it leaves to the answer: expected a "
                             "call of the function that the problem asks for.")


def _score(reason, num_passed, num_tests, num_stages):
    share = num_passed / num_tests if num_tests else 0.0
    parts = {"correct": float(reason == "correct"), "compiled": float(num_stages >= 1), "ran": float(num_stages >= 2),
             "passed": share}
    return Score(share, parts, reason)


@functools.lru_cache(maxsize=4096)
def _plan(test):
    """What the judge needs of a test: {"text", "names" that it leaves to the answer, "modules" that it only uses}.

    Built-in names are Python's own, lest an answer define abs or set to its liking - except in a test that needs none
    but built-in names of the answer, such as one of a function called sum. A module of the standard library that a test
    uses without importing it, as in math.isclose, is the library's, too.
    """
    try:
        tree = ast.parse(test)
        tables = [symtable.symtable(test, "<test>", "exec")]
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"the test {test!r:.80} is no Python program: {error}") from None
    used, bound = set(), set()
    while tables:
        table = tables.pop()
        tables += table.get_children()
        for symbol in table.get_symbols():
            if table.get_type() == "module" or symbol.is_global():
                used |= {symbol.get_name()} if symbol.is_referenced() else set()
                bound |= {symbol.get_name()} if symbol.is_assigned() or symbol.is_imported() else set()
    nodes = list(ast.walk(tree))
    owners = [node.value for node in nodes if isinstance(node, ast.Attribute)]  # math of math.isclose
    bare = {node.id for node in set(nodes).difference(owners) if isinstance(node, ast.Name)}
    modules = {name for name in used - bound - bare if name in sys.stdlib_module_names}
    names = used - bound - modules
    names = {name for name in names if not hasattr(builtins, name)} or names
    return {"text": test, "names": sorted(names), "modules": sorted(modules)}
