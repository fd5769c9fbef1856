"""Whether an answer has the form that its task asks for, right or wrong."""

import re

from ..data.documents import task_type

# Lazily up to the first closing fence. An opening one that is never closed costs a scan of the rest of the text: the
# bound on its length bounds how many there can be.
_FENCED_BLOCK = re.compile(r"^[ \t]*(`{3,9}|~{3,9})[^`\n]*\n(.*?)^[ \t]*\1", re.DOTALL | re.MULTILINE)


def check_format(problem, response, marker_counter):
    """None for a valid Response to an Example, else why not: truncated, empty, no_answer, several_answers or no_code.

    Every answer has to end by itself and say something after its thoughts; to a maths problem it has exactly one
    final-answer marker, by marker_counter(content); to a code problem at least one fenced block with something in it.
    """
    kind = task_type(problem)
    if not response.ended:
        return "truncated"
    if not response.content.strip():
        return "empty"
    if kind == "math":
        num_markers = marker_counter(response.content)
        return None if num_markers == 1 else "several_answers" if num_markers else "no_answer"
    if kind == "code" and not any(match[2].strip() for match in _FENCED_BLOCK.finditer(response.content)):
        return "no_code"
    return None
