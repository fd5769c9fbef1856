"""Answers from an OpenAI-compatible server that speaks token ids, such as vLLM, in the form of a Generator."""

import json
import shutil

import numpy as np
import requests

from ..model.generate import Answer

_SEED_BITS = 62  # servers take a signed integer, and may add the sample's number to it


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
            choices = sorted(reply["choices"], key=lambda choice: choice["index"])
            wanted = sum(count for _, count in request)
            if len(choices) != wanted:
                raise ValueError(f"rollout.server: {len(choices)} answers came, {wanted} were asked for.")
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
