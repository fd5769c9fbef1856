"""OpenAI-compatible servers that speak token ids, such as vLLM, in the form of a Generator and of an Annotator.

N targets, K top-k.
"""

import json
import shutil

import numpy as np
import requests

from ..data.batches import long_samples_error
from ..data.endpoint import EndpointError
from ..model.generate import Answer

_SEED_BITS = 62  # servers take a signed integer, and may add the sample's number to it
_ROUNDING = 1e-4  # what a log-probability near 0 may be above it


class RemoteGenerator:
    """Answers by rollout.server with the weights that `load` has handed over.

    endpoint: data.endpoint.Endpoint of the server; rollout: RolloutConfig; save_model(folder) writes the model's files;
    folder: where weights are handed over, under a path that the server sees too.
    """

    def __init__(self, endpoint, rollout, *, eos_id, save_model, folder):
        self.endpoint, self.rollout, self.eos_id = endpoint, rollout, eos_id
        self.save_model, self.folder = save_model, folder
        self.loaded = None
        self.max_new_tokens = rollout.max_new_tokens

    def load(self, digest):
        """Hand the weights over and wait until the server has loaded them; `digest` tells whether they are new."""
        if digest == self.loaded:
            return
        server = self.rollout.server
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.save_model(self.folder)
        url = server.reload_url or server.url.rstrip("/").removesuffix("/v1") + "/reload"
        body = json.loads(server.reload_body.replace("{folder}", json.dumps(str(self.folder.resolve()))[1:-1]))
        try:
            answer = requests.post(url, json=body, timeout=server.timeout_s)
        except requests.RequestException as error:
            raise OSError(f"rollout.server: {url} does not take the weights ({error}): start the server, or give "
                          "rollout.server.reload_url.") from error
        if answer.status_code != 200:
            raise OSError(f"rollout.server: {url} answered {answer.status_code} to {json.dumps(body)}: "
                          f"{answer.text[:300]}")
        self.loaded = digest

    def generate(self, prompts, keys, on_answer=None):
        """Answers, in the order of the prompts; keys: (seed, prompt, sample) triples, the samples of a prompt side by
        side. Raises ValueError where the server's reply lacks token ids or log-probabilities."""
        groups = []  # (first place, count) of a prompt's samples
        for i, (_, prompt, _) in enumerate(keys):
            if i and keys[i - 1][1] == prompt:
                groups[-1][1] += 1
            else:
                groups.append([i, 1])
        per_request = self.rollout.server.prompts_per_request
        requests_ = [groups[i:i + per_request] for i in range(0, len(groups), per_request)]
        bodies = [self._body([prompts[first] for first, _ in request], request[0][1], keys[request[0][0]])
                  for request in requests_]
        answers = []
        for request, reply in zip(requests_, self.endpoint.map(bodies, "/completions"), strict=True):
            choices = _choices("rollout.server", reply, sum(count for _, count in request))
            answers += [self._answer(choice) for choice in choices]
        if on_answer:
            for i, answer in enumerate(answers):
                on_answer(i, answer)
        return answers

    def _body(self, prompts, samples_per_prompt, key):
        rollout = self.rollout
        seed = np.random.SeedSequence([int(number) for number in key]).generate_state(1, np.uint64)[0]
        return {"model": rollout.server.model, "prompt": [[int(token) for token in prompt] for prompt in prompts],
                "n": samples_per_prompt, "max_tokens": rollout.max_new_tokens, "temperature": rollout.temperature,
                "top_p": rollout.top_p, "top_k": rollout.top_k or -1, "seed": int(seed) >> (64 - _SEED_BITS),
                "logprobs": 0, "return_token_ids": True, "return_tokens_as_token_ids": True,
                "skip_special_tokens": False}

    def _answer(self, choice):
        logprobs = choice.get("logprobs") or {}
        tokens = choice.get("token_ids")
        if tokens is None:
            named = logprobs.get("tokens") or []
            if not named or not all(str(token).startswith("token_id:") for token in named):
                raise ValueError("rollout.server: the reply has no token ids (choices[].token_ids, or tokens named "
                                 "token_id:N): answers are never tokenized again; use a server that returns them.")
            tokens = [int(token.removeprefix("token_id:")) for token in named]
        token_logprobs = logprobs.get("token_logprobs")
        if token_logprobs is None or len(token_logprobs) != len(tokens):
            raise ValueError(f"rollout.server: {len(tokens)} tokens came with {len(token_logprobs or [])} "
                             "log-probabilities: expected one each.")
        truncated = choice.get("finish_reason") == "length"
        if not tokens or (not truncated and tokens[-1] != self.eos_id):
            raise ValueError(f"rollout.server: an answer that ended does not end in the turn end, token {self.eos_id}: "
                             "the server has to return it among the token ids.")
        kept = logprobs.get("kept_logprobs")
        if kept is None and (self.rollout.top_k or self.rollout.top_p < 1):
            raise ValueError(f"rollout.top_k={self.rollout.top_k}, rollout.top_p={self.rollout.top_p}: the server does "
                             "not say how much probability they keep (kept_logprobs); use 0 and 1.")
        kept = np.zeros(len(tokens), np.float32) if kept is None else np.array(kept, np.float32)
        return Answer(np.array(tokens, np.int32), np.array(token_logprobs, np.float32), kept, truncated)


class RemoteAnnotator:
    """The teacher behind kd.server, with the interface of an Annotator.

    Asks for prompt_logprobs as vLLM has them: choices[].prompt_logprobs holds null for a prompt's first token, and for
    each further one a dictionary {token id: {"logprob": x, ...}} of the K most likely tokens and the prompt's own.
    Source: vllm/entrypoints/openai/completion/protocol.py and vllm/logprobs.py.

    endpoint: data.endpoint.Endpoint of the server; row_len: tokens that a sample may have; vocab_size: the teacher's.
    """

    def __init__(self, endpoint, *, top_k, row_len, vocab_size, prompts_per_request):
        self.endpoint, self.top_k, self.row_len, self.vocab_size = endpoint, top_k, row_len, vocab_size
        self.prompts_per_request = prompts_per_request

    def top_logprobs(self, samples):
        """As Annotator.top_logprobs. Raises OSError where the server gives no answer, ValueError where its answer is
        not what was asked for."""
        lengths = np.diff(samples.offsets)
        if lengths.max(initial=0) > self.row_len:
            raise long_samples_error(lengths, self.row_len)
        num_targets = int(samples.is_target.sum())
        ids = np.zeros((num_targets, self.top_k), np.int32)
        logprobs = np.zeros((num_targets, self.top_k), np.float32)
        label_logprobs = np.zeros(num_targets, np.float32)
        spans = [slice(*span) for span in zip(samples.offsets[:-1], samples.offsets[1:], strict=True)]
        targets_before = np.concatenate([[0], np.cumsum(samples.is_target)])[samples.offsets]
        asked = np.flatnonzero(np.diff(targets_before))  # those with a target
        requests_ = [asked[i:i + self.prompts_per_request] for i in range(0, len(asked), self.prompts_per_request)]

        def read(i, reply):
            for sample, choice in zip(requests_[i], _choices("kd.server", reply, len(requests_[i])), strict=True):
                tokens, places = samples.tokens[spans[sample]], np.flatnonzero(samples.is_target[spans[sample]])
                positions = self._positions(choice, len(tokens))
                for row, place in enumerate(places, targets_before[sample]):
                    ids[row], logprobs[row], label_logprobs[row] = self._top(positions[place], int(tokens[place]))

        try:
            self.endpoint.map([self._body([samples.tokens[spans[sample]].tolist() for sample in request])
                               for request in requests_], "/completions", read=read)
        except EndpointError as error:
            needs = (f" It has to serve kd.server.model={self.endpoint.model}, prompts of {self.row_len} tokens and "
                     f"one more, and prompt_logprobs={self.top_k} (vllm serve: --served-model-name, --max-model-len "
                     f"{self.row_len + 1}, --max-logprobs {self.top_k}).") if error.refused else ""
            raise OSError(f"kd.server: {error}{needs}") from error
        return ids, logprobs, label_logprobs

    def _body(self, prompts):
        # One token is what vLLM generates at least. Greedy: its first engine divided the prompt's logits too by the
        # temperature, and at 0 leaves them.
        return {"model": self.endpoint.model, "prompt": prompts, "max_tokens": 1, "temperature": 0,
                "prompt_logprobs": self.top_k}

    def _positions(self, choice, num_tokens):
        positions = choice.get("prompt_logprobs")
        if not isinstance(positions, list):
            raise ValueError("kd.server: the reply has no list choices[].prompt_logprobs: use a server that returns "
                             "the log-probabilities of a prompt's tokens, such as vLLM or mindpangu.serve.")
        if len(positions) != num_tokens:
            raise ValueError(f"kd.server: log-probabilities of {len(positions)} tokens came for a prompt of "
                             f"{num_tokens}: the server has to take token ids as they are, without adding a token or "
                             "leaving out what it has cached (vllm serve: --no-enable-prefix-caching).")
        return positions

    def _top(self, position, label):
        """(ids_K, logprobs_K, the label's log-probability) of one position of a reply."""
        try:
            found = {int(token): float(entry["logprob"]) for token, entry in position.items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"kd.server: {str(position)[:200]} came for a token's log-probabilities: expected "
                             "{token id: {\"logprob\": number}}, as in vLLM's choices[].prompt_logprobs.") from error
        for token, logprob in found.items():
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"kd.server: token {token} came, but the teacher's vocabulary has {self.vocab_size}: "
                                 "serve the folder that teacher= names.")
            if not logprob <= _ROUNDING:  # nor NaN
                raise ValueError(f"kd.server: log-probability {logprob} came: expected at most 0; check the weights "
                                 "that it serves (vllm serve: --logprobs-mode raw_logprobs, the default).")
        if label not in found:
            raise ValueError(f"kd.server: a token's log-probabilities came without that of the prompt's own token "
                             f"{label}: the server has to return it beside the most likely ones.")
        top = sorted(found, key=found.get, reverse=True)[:self.top_k]
        if len(top) < self.top_k:
            raise ValueError(f"kd.server: {len(top)} log-probabilities came for a token, kd.top_k={self.top_k} were "
                             f"asked for: raise the server's limit (vllm serve: --max-logprobs {self.top_k}).")
        return top, [found[token] for token in top], found[label]


def _choices(section, reply, count):
    """The choices of a reply in the order of what was asked for."""
    choices = reply.get("choices")
    try:
        choices = sorted(choices, key=lambda choice: choice["index"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{section}: the reply has no list of choices with an index each: expected an "
                         "OpenAI-compatible server; check the url.") from error
    if len(choices) != count:
        raise ValueError(f"{section}: {len(choices)} answers came, {count} were asked for.")
    return choices
