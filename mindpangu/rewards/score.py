"""What verifiers are given and what they return."""

from typing import NamedTuple


class Response(NamedTuple):
    """A sampled answer as text."""

    content: str  # the answer without its thoughts
    thoughts: str | None = None
    ended: bool = True  # closed by the turn end, not truncated
    num_tokens: int = 0  # thoughts and turn end included


class Score(NamedTuple):
    """value: of a verifier, the share that is right, 0 to 1; of the router, the reward."""

    value: float
    parts: dict[str, float]  # what the value is made of, by name
    reason: str  # one of the verifier's few words, such as "wrong_answer": counted in the metrics
