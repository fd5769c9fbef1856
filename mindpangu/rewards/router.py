"""The reward of an answer: each problem goes to the verifier of its task type.

P problems, G answers per problem.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

from ..data.documents import task_type
from .format import check_format
from .repetition import length_penalty, line_repetition, ngram_repetition
from .score import Score


class Rewards:
    """Verifiers with their worker processes, which start when they are first needed; to be closed.

    config: a RewardsConfig; max_new_tokens: where answers are truncated; cache: the folder of the judge's replies.
    Answers are verified config.num_workers at a time.
    """

    def __init__(self, config, max_new_tokens, cache=None):
        self.config, self.max_new_tokens, self.cache = config, max_new_tokens, cache
        self._verifiers, self._lock = {}, threading.Lock()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """End the workers; a later call starts new ones."""
        with self._lock:
            for verifier in self._verifiers.values():
                verifier.close()
            self._verifiers.clear()

    def verifier(self, kind):
        """The verifier of a task type. Raises ValueError where the recipe or the machine lacks what it needs."""
        with self._lock:
            if kind not in self._verifiers:
                self._verifiers[kind] = self._make(kind)
            return self._verifiers[kind]

    def _make(self, kind):
        # Each imported when it is needed: all of them would add half a second to the start of every command.
        config, judge = self.config, self.config.judge
        if kind == "math":
            from .math import MathVerifier

            return MathVerifier(config.num_workers, config.math_timeout_s)
        if kind == "code":
            from .code import CodeVerifier

            return CodeVerifier(timeout_s=config.code.timeout_s, memory_mib=config.code.memory_mib,
                                max_output_kib=config.code.max_output_kib, max_processes=config.code.max_processes,
                                num_workers=config.num_workers, allow_unsafe=config.code.allow_unsafe)
        if judge.url is None:
            raise ValueError("rewards.judge.url is missing: problems without an answer or tests are judged by a "
                             "language model; give its OpenAI-compatible endpoint, for example "
                             "rewards.judge.url=http://127.0.0.1:8000/v1, or remove those problems.")
        from ..data.endpoint import connect
        from .preference import PreferenceJudge

        return PreferenceJudge(connect(judge, self.cache), judge.mode)

    def check(self, problems):
        """Raise ValueError for the first problem that its verifier cannot judge, naming its place."""
        judged = False
        for place, problem in enumerate(problems):
            kind = task_type(problem)
            if kind == "preference":
                if not judged:
                    self.verifier(kind).check()
                judged = True
                continue
            try:
                self.verifier(kind).check(problem)
            except ValueError as error:
                raise ValueError(f"problem {place} ({problem.messages[-2].content[:60]!r}): {error}") from error

    def can_verify(self, problem):
        """Whether an answer to this Example is right or wrong, by a verifier."""
        if task_type(problem) == "preference":
            return False
        try:
            self.verifier(task_type(problem)).check(problem)
        except ValueError:
            return False
        return True

    def are_correct(self, problems, responses):
        """[bool]: whether each response solves its (verifiable) problem; its format does not matter."""
        scores = self._map(lambda pair: self.verifier(task_type(pair[0])).score(*pair),
                           list(zip(problems, responses, strict=True)))
        return [score.value == 1.0 for score in scores]

    def score_groups(self, problems_P, responses_PG):
        """[[Score]]: the reward of every response, its parts and why; see RewardsConfig.

        parts: "correct" (1 or 0; not of preferences), "format" (1: valid), what the verifier adds, and each weighted
        penalty, from 0 to 1.
        """
        graded = self._map(self._grade_group, list(zip(problems_P, responses_PG, strict=True)))
        return [[self._reward(response, *grade) for response, grade in zip(responses, grades, strict=True)]
                for responses, grades in zip(responses_PG, graded, strict=True)]

    def _grade_group(self, pair):
        """(Score of the verifier or None, why the format is wrong or None) of each response to a problem."""
        from .math import count_final_answers

        problem, responses = pair
        kind = task_type(problem)
        wrong_format = [check_format(problem, response, count_final_answers) for response in responses]
        if kind != "preference":
            return [(self.verifier(kind).score(problem, response), wrong)
                    for response, wrong in zip(responses, wrong_format, strict=True)]
        valid = [response for response, wrong in zip(responses, wrong_format, strict=True) if wrong is None]
        scores = iter(self.verifier(kind).score_group(problem, valid) if valid else [])
        return [(next(scores) if wrong is None else None, wrong) for wrong in wrong_format]

    def _reward(self, response, verified, wrong_format):
        config = self.config
        parts = dict(verified.parts) if verified else {}
        parts["format"] = float(wrong_format is None)
        if wrong_format is not None:
            value, reason = config.wrong_format, wrong_format
        else:
            share = verified.value
            if "passed" in parts and not config.code.partial_credit:
                share = parts["correct"]
            value, reason = config.wrong_answer + (config.correct - config.wrong_answer) * share, verified.reason
        penalties = {"wrong_format": (config.format_weight, lambda: float(wrong_format is not None)),
                     "ngram_repetition": (config.ngram_weight, lambda: ngram_repetition(response.content)),
                     "line_repetition": (config.line_weight, lambda: line_repetition(response.content)),
                     "length": (config.length_weight,
                                lambda: -length_penalty(response.num_tokens,
                                                        self.max_new_tokens - config.length_buffer,
                                                        self.max_new_tokens))}
        for name, (weight, penalty) in penalties.items():
            if weight:
                parts[name] = penalty()
                value -= weight * parts[name]
        return Score(value, parts, reason)

    def _map(self, function, items):
        with ThreadPoolExecutor(self.config.num_workers) as threads:
            return list(threads.map(function, items))
