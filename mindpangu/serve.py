"""An OpenAI-compatible server for a trained model: python -m mindpangu.serve RUN [--port 8000]

RUN is a run folder, a checkpoint or a Hugging Face folder with tokenizer.model. Requests are answered one after the
other, each as a batch of its prompts and samples; nobody is asked for a key: keep it to machines that you trust.

  GET  /v1/models, /health
  POST /v1/completions       prompt: a text, token ids, or a list of either; n, max_tokens (16), temperature (1), top_p,
                             top_k, seed, logprobs (0), return_token_ids. A text is one of ordinary characters; special
                             tokens are given by id. Log-probabilities are those of the distribution sampled from, and
                             kept_logprobs the mass that top_p and top_k left in it; tokens include the turn end.
                             prompt_logprobs: a number k; the reply has, in vLLM's form and at temperature 1, the log-
                             probabilities of each of the prompt's tokens after the first and of the k most likely ones
  POST /v1/chat/completions  messages: role, content and an assistant's reasoning_content; logprobs (true or false) and
                             the rest as above
  POST /reload               path: a folder of safetensors of the same model, whose weights replace the ones in use

A seed, a prompt's place in its request and a sample's number determine an answer.
"""

import argparse
import contextlib
import gc
import json
import queue
import signal
import sys
import threading
import time
import traceback
import uuid
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mindpangu.config import RunConfig
from mindpangu.data.chat import decode_response, encode_prompt
from mindpangu.data.documents import Message
from mindpangu.data.tokenizer import Tokenizer
from mindpangu.runtime.checkpoint import find_model
from mindpangu.runtime.device import activation_dtype, start
from mindpangu.runtime.metrics import say

MODEL = "mindpangu"  # its name in requests
_MAX_BODY_MIB = 64
_MAX_GENERATORS = 4  # kept at most: each has a cache of keys and values, and compiles before its first answer
_MIN_GENERATED = 16

_IGNORED = ("user", "metadata", "stream_options")
# Fields of this interface, or of vLLM's, that are taken with these values only: those that change nothing here.
_FIXED = {"stream": (False,), "stop": ([], ""), "echo": (False,), "suffix": ("",), "presence_penalty": (0,),
          "frequency_penalty": (0,), "repetition_penalty": (1,), "min_p": (0,), "logit_bias": ({},), "tools": ([],),
          "tool_choice": ("none", "auto"), "response_format": ({"type": "text"},), "top_logprobs": (0,),
          "ignore_eos": (False,), "skip_special_tokens": (False,), "return_tokens_as_token_ids": (True,)}


class _RequestError(Exception):
    """What a client did wrong. param: the field."""

    def __init__(self, message, param=None, status=400, code=None):
        # A field's name or value that is shown may hold half of a surrogate pair, which no terminal can be sent.
        super().__init__(message.encode(errors="backslashreplace").decode())
        self.param, self.status, self.code = param, status, code


class _Request(NamedTuple):
    """What to generate."""

    prompts: list  # int32 arrays
    num_samples: int
    max_tokens: int
    sampling: tuple  # temperature, top_k, top_p
    seed: int | None


class Engine:
    """The model, its tokenizer, its Generators and its Annotator. Everything but `tokenizer` and the numbers is of one
    thread."""

    def __init__(self, folder, run, *, num_slots, max_prompt_len, max_new_tokens, max_logprobs, seed):
        from mindpangu.model.weights import load_model

        self.tokenizer = Tokenizer(folder / "tokenizer.model")
        self.is_frozen = run.precision == "bfloat16"
        self.model = load_model(folder, activation_dtype(run), "bfloat16" if self.is_frozen else None)
        limit = self.model.config.max_seq_len
        self.max_new_tokens = max_new_tokens or min(512, limit // 2)
        self.max_prompt_len = max_prompt_len or min(1024, limit - self.max_new_tokens)
        if self.max_prompt_len < 1 or self.max_prompt_len + self.max_new_tokens > limit:
            raise ValueError(f"--max-prompt-len {self.max_prompt_len} and --max-new-tokens {self.max_new_tokens}: "
                             f"expected at most {limit} together, what the model was made for.")
        self.weights, self.num_slots, self.vocab_size = str(folder), num_slots, self.model.config.vocab_size
        self.max_logprobs, self.logits_chunk = min(max_logprobs, self.vocab_size), run.logits_chunk
        self._generators = {}  # (temperature, top_k, top_p, tokens of an answer) -> Generator
        self._annotator = None  # made for the first prompt_logprobs
        self._seeds = np.random.Generator(np.random.Philox(seed))

    def generate(self, request):
        """A list of answers for each prompt: (tokens, log-probabilities, kept log-probabilities, ended) each."""
        seed = int(self._seeds.integers(2**62)) if request.seed is None else request.seed
        keys = [(seed, prompt, sample) for prompt in range(len(request.prompts))
                for sample in range(request.num_samples)]
        generator = self._generator(request.sampling, request.max_tokens)
        answers = generator.generate([request.prompts[prompt] for _, prompt, _ in keys], keys)
        self._check_finite([answer.logprobs for answer in answers])
        count = request.max_tokens
        cut = [(answer.tokens[:count], answer.logprobs[:count], answer.kept_logprobs[:count],
                not answer.truncated and len(answer.tokens) <= count) for answer in answers]
        return [cut[i:i + request.num_samples] for i in range(0, len(cut), request.num_samples)]

    def score(self, prompts):
        """For each prompt, of its T - 1 tokens after the first: the max_logprobs most likely tokens in their place,
        these tokens' log-probabilities, and its own."""
        from mindpangu.data.batches import tokenized_to_samples
        from mindpangu.distillation.annotate import Annotator

        if self._annotator is None:
            self._annotator = Annotator(self.model, top_k=self.max_logprobs, row_len=self.max_prompt_len, num_rows=1,
                                        chunk_size=min(self.logits_chunk, self.max_prompt_len))
        scored = self._annotator.top_logprobs(
            tokenized_to_samples([(prompt, np.arange(len(prompt)) > 0) for prompt in prompts]))
        self._check_finite(scored[1:])
        ends = np.cumsum([len(prompt) - 1 for prompt in prompts])[:-1]
        return list(zip(*(np.split(array, ends) for array in scored), strict=True))

    def _check_finite(self, arrays):
        if not all(np.isfinite(array).all() for array in arrays):
            raise _RequestError(f"the model's log-probabilities are not finite: check its weights, {self.weights}.",
                                status=500)

    def _generator(self, sampling, max_tokens):
        from mindpangu.model.generate import Generator

        # Rounded up, so that few are compiled; what is generated beyond max_tokens is cut off.
        length = min(self.max_new_tokens, max(_MIN_GENERATED, 1 << (max_tokens - 1).bit_length()))
        key = (*sampling, length)
        if key not in self._generators:
            if len(self._generators) == _MAX_GENERATORS:
                self._drop_generators()
            temperature, top_k, top_p = sampling
            self._generators[key] = Generator(
                self.model, num_slots=self.num_slots, prompt_len=self.max_prompt_len, max_new_tokens=length,
                eos_id=self.tokenizer.turn_end_id, pad_id=self.tokenizer.pad_id, temperature=temperature, top_k=top_k,
                top_p=top_p)
        return self._generators[key]

    def _drop_generators(self):
        import mindspore as ms

        self._generators.clear()
        self._annotator = None
        gc.collect()
        ms.ms_memory_recycle()  # compiled graphs hold the caches of the Generators that are gone

    def reload(self, path):
        """Replace the weights by those of a folder."""
        from mindpangu.model.weights import load_weights

        folder = Path(path)
        tokenizer = folder / "tokenizer.model"
        try:
            if tokenizer.is_file() and Tokenizer(tokenizer).digest != self.tokenizer.digest:
                raise ValueError(f"{folder} was trained with another tokenizer than {self.weights}: start a server for "
                                 "it, or put the right tokenizer.model there.")
            load_weights(self.model, folder)
        except (ValueError, OSError) as error:
            raise _RequestError(str(error), "path") from error
        self.weights = str(folder)
        if self.is_frozen:  # bfloat16 weights are not replaced in place: compiled graphs would keep the former ones
            self._drop_generators()


# ---- Requests --------------------------------------------------------------------------------------------------------

def _field(body, name, default, is_right, expected):
    value = body.get(name)
    if value is None:
        return default
    if not is_right(value):
        raise _RequestError(f"{name}={_shown(value)}: expected {expected}.", name)
    return value


def _integer(body, name, default, first, last):
    return _field(body, name, default, lambda value: type(value) is int and first <= value <= last,
                  f"an integer from {first} to {last}")


def _number(body, name, default, is_right, expected):
    return _field(body, name, default, lambda value: type(value) in (int, float) and is_right(value), expected)


def _flag(body, name):
    return _field(body, name, False, lambda value: type(value) is bool, "true or false")


def _check_fields(body, engine, known):
    """Raise _RequestError for a field that is unknown, or whose value asks for what this server does not do."""
    if body.get("model") not in (None, MODEL):
        raise _RequestError(f"model={_shown(body['model'])} does not exist: expected {MODEL}.", "model", 404,
                            "model_not_found")
    fixed = _FIXED | {"stop_token_ids": ([], [engine.tokenizer.turn_end_id])}
    for name, value in body.items():
        if name in fixed:
            if value is not None and value not in fixed[name]:
                options = " or ".join(json.dumps(option) for option in fixed[name])
                raise _RequestError(f"{name}={_shown(value)} is not supported: expected {options}, or no such field.",
                                    name, code="unsupported_value")
        elif name not in ("model", *known, *_IGNORED):
            raise _RequestError(f"{name} is unknown: expected some of {', '.join(known)}.", name,
                                code="unknown_parameter")


_SAMPLING_FIELDS = ("n", "max_tokens", "temperature", "top_p", "top_k", "seed", "logprobs", "return_token_ids")


def _read_sampling(body, engine, prompts, max_tokens):
    for i, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= engine.max_prompt_len:
            raise _RequestError(f"prompt {i} has {len(prompt)} tokens: this server takes 1 to {engine.max_prompt_len} "
                                "(--max-prompt-len).", "prompt", code="context_length_exceeded")
    if max_tokens > engine.max_new_tokens:
        raise _RequestError(f"max_tokens={max_tokens}: this server gives at most {engine.max_new_tokens} "
                            "(--max-new-tokens).", "max_tokens", code="context_length_exceeded")
    temperature = _number(body, "temperature", 1.0, lambda value: value == 0 or 0.01 <= value <= 100,
                          "0, or a number from 0.01 to 100")
    top_p = _number(body, "top_p", 1.0, lambda value: 0 < value <= 1, "a number above 0, and at most 1")
    top_k = _integer(body, "top_k", 0, -1, engine.vocab_size)
    return _Request(prompts, _integer(body, "n", 1, 1, 1024), max_tokens,
                    (float(temperature), max(0, top_k), float(top_p)), _integer(body, "seed", None, 0, 2**63 - 1))


def _read_prompts(body, engine):
    """Token ids of each prompt."""
    prompt = body.get("prompt")

    def are_ids(value):
        return isinstance(value, list) and bool(value) and all(
            type(token) is int and 0 <= token < engine.vocab_size for token in value)

    if isinstance(prompt, str) or are_ids(prompt):
        prompt = [prompt]
    if not isinstance(prompt, list) or not prompt or not (
            all(isinstance(one, str) for one in prompt) or all(map(are_ids, prompt))):
        raise _RequestError(f"prompt={_shown(prompt)}: expected a text, token ids from 0 to {engine.vocab_size - 1}, "
                            "or a list of texts or of lists of token ids, none of them empty.", "prompt")
    if isinstance(prompt[0], str):
        prompt = [[engine.tokenizer.bos_id, *engine.tokenizer.encode(_text(text, "prompt"))] for text in prompt]
    return [np.array(tokens, np.int32) for tokens in prompt]


def _read_messages(body):
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _RequestError(f"messages={_shown(messages)}: expected a list of {{\"role\", \"content\"}}.", "messages")
    read = []
    for i, message in enumerate(messages):
        name = f"messages[{i}]"
        if not isinstance(message, dict):
            raise _RequestError(f"{name}={_shown(message)}: expected {{\"role\", \"content\"}}.", name)
        unknown = sorted(key for key, value in message.items()
                         if value is not None and key not in ("role", "content", "reasoning_content", "name"))
        if unknown:
            raise _RequestError(f"{name}.{unknown[0]} is not supported: expected role, content, and reasoning_content "
                                "of an assistant's message.", f"{name}.{unknown[0]}")
        role, content, thoughts = (None if key == "reasoning_content" and message.get(key) is None else
                                   _text(message.get(key), f"{name}.{key}")
                                   for key in ("role", "content", "reasoning_content"))
        read.append(Message(role, content, thoughts))
    return read


def _text(value, name):
    if not isinstance(value, str):
        raise _RequestError(f"{name}={_shown(value)}: expected a text.", name)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _RequestError(f"{name} holds half of a surrogate pair: expected valid Unicode.", name) from None
    return value


def _shown(value):
    shown = json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= 80 else shown[:77] + "..."


# ---- Replies ---------------------------------------------------------------------------------------------------------

def complete(engine, run, body):
    """The reply to /v1/completions; run(function, *arguments) calls it in the engine's thread."""
    _check_fields(body, engine, ("prompt", "prompt_logprobs", *_SAMPLING_FIELDS))
    max_tokens = _integer(body, "max_tokens", min(16, engine.max_new_tokens), 1, sys.maxsize)
    logprobs = _field(body, "logprobs", None, lambda value: type(value) is int and value in (0, 1), "0 or 1: the "
                      "log-probability of each token; others are not supported")
    with_ids = _flag(body, "return_token_ids")
    num_likely = _field(body, "prompt_logprobs", None,
                        lambda value: type(value) is int and 0 <= value <= engine.max_logprobs,
                        f"an integer from 0 to {engine.max_logprobs} (--max-logprobs)")
    request = _read_sampling(body, engine, _read_prompts(body, engine), max_tokens)
    # Of the same weights: nothing is reloaded within a job.
    groups, scored = run(lambda: (engine.generate(request),
                                  None if num_likely is None else engine.score(request.prompts)))
    choices = []
    for place, (prompt, answers) in enumerate(zip(request.prompts, groups, strict=True)):
        before = engine.tokenizer.decode(prompt)
        for tokens, token_logprobs, kept_logprobs, ended in answers:
            choice = {"index": len(choices), "text": _continuation(engine.tokenizer, prompt, before, tokens),
                      "finish_reason": "stop" if ended else "length", "logprobs": None}
            if logprobs is not None:
                choice["logprobs"] = {"tokens": [f"token_id:{token}" for token in tokens],
                                      "token_logprobs": token_logprobs.tolist(), "top_logprobs": None,
                                      "kept_logprobs": kept_logprobs.tolist()}
            if scored:
                choice["prompt_logprobs"] = _prompt_logprobs(prompt, *scored[place], num_likely)
            choices.append(choice | (_ids(prompt, tokens) if with_ids else {}))
    return _reply("cmpl", "text_completion", request, groups, choices)


def chat(engine, run, body):
    """The reply to /v1/chat/completions."""
    _check_fields(body, engine, ("messages", "max_completion_tokens", *_SAMPLING_FIELDS))
    name = "max_tokens" if body.get("max_completion_tokens") is None else "max_completion_tokens"
    max_tokens = _integer(body, name, engine.max_new_tokens, 1, sys.maxsize)
    logprobs, with_ids = _flag(body, "logprobs"), _flag(body, "return_token_ids")
    try:
        prompt = encode_prompt(engine.tokenizer, _read_messages(body))
    except ValueError as error:
        raise _RequestError(str(error), "messages") from error
    request = _read_sampling(body, engine, [prompt], max_tokens)
    groups = run(engine.generate, request)
    choices = []
    for tokens, token_logprobs, _, ended in groups[0]:
        said = decode_response(engine.tokenizer, tokens)
        message = {"role": "assistant", "content": said.content}
        if said.thoughts is not None:
            message["reasoning_content"] = said.thoughts
        choice = {"index": len(choices), "message": message, "finish_reason": "stop" if ended else "length",
                  "logprobs": None}
        if logprobs:
            choice["logprobs"] = {"content": [{"token": f"token_id:{token}", "logprob": logprob, "bytes": None,
                                               "top_logprobs": []}
                                              for token, logprob in zip(tokens, token_logprobs.tolist(), strict=True)]}
        choices.append(choice | (_ids(prompt, tokens) if with_ids else {}))
    return _reply("chatcmpl", "chat.completion", request, groups, choices)


def reload(engine, run, body):
    """The reply to /reload, once the weights are in use."""
    unknown = sorted(body.keys() - {"path"})
    if unknown:
        raise _RequestError(f"{unknown[0]} is unknown: expected path.", unknown[0], code="unknown_parameter")
    run(engine.reload, _text(body.get("path"), "path"))
    return {"status": "ok", "path": engine.weights}


def _reply(prefix, kind, request, groups, choices):
    num_prompt = sum(map(len, request.prompts))
    num_written = sum(len(answer[0]) for answers in groups for answer in answers)
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": MODEL,
            "choices": choices, "usage": {"prompt_tokens": num_prompt, "completion_tokens": num_written,
                                          "total_tokens": num_prompt + num_written}}


def _ids(prompt, tokens):
    return {"token_ids": tokens.tolist(), "prompt_token_ids": prompt.tolist()}


def _prompt_logprobs(prompt, ids, logprobs, own_logprobs, num_likely):
    """vLLM's choices[].prompt_logprobs. A rank beyond those computed is null, as are the decoded tokens."""
    positions = [None]
    for token, likely, their_logprobs, own in zip(prompt[1:].tolist(), ids.tolist(), logprobs.tolist(),
                                                  own_logprobs.tolist(), strict=True):
        ranks = {other: rank for rank, other in enumerate(likely, 1)}
        entries = {token: own} | dict(zip(likely[:num_likely], their_logprobs, strict=False))
        positions.append({str(other): {"logprob": logprob, "rank": ranks.get(other), "decoded_token": None}
                          for other, logprob in entries.items()})
    return positions


def _continuation(tokenizer, prompt, before, tokens):
    """The text that tokens add to the prompt's: decoded alone they would lose a leading space to the dummy prefix."""
    if len(tokens) and tokens[-1] == tokenizer.turn_end_id:
        tokens = tokens[:-1]
    whole = tokenizer.decode([*prompt, *tokens])
    # A character whose bytes are spread over both is part of what was added.
    common = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
    return whole[common:]


# ---- HTTP ------------------------------------------------------------------------------------------------------------

POSTS = {"/v1/completions": complete, "/v1/chat/completions": chat, "/reload": reload}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # connections that wait to be accepted; the default is 5

    def __init__(self, address):
        super().__init__(address, _Handler)
        self.engine, self.jobs, self.started = None, queue.SimpleQueue(), int(time.time())

    def run(self, function, *arguments):
        """Call the function in the engine's thread after all that wait already; returns or raises what it does."""
        future = Future()
        self.jobs.put((future, function, arguments))
        return future.result()

    def work(self):
        """Run the jobs, for ever: MindSpore stays in the thread that set it up."""
        while True:
            # Ctrl-C ends the process at once; MindSpore sets a handler, when it compiles, that takes seconds to.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            future, function, arguments = self.jobs.get()
            try:
                future.set_result(function(*arguments))
            except Exception as error:  # noqa: BLE001 - raised in the thread of the request that waits for it
                future.set_exception(error)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 600  # seconds that an idle connection is kept

    def handle(self):
        with contextlib.suppress(ConnectionError):  # the client is gone; the base class ends what takes too long
            super().handle()

    def do_GET(self):
        engine = self.server.engine
        replies = {"/health": {"status": "ok"},
                   "/v1/models": {"object": "list", "data": [
                       {"id": MODEL, "object": "model", "created": self.server.started, "owned_by": MODEL,
                        "root": engine.weights, "max_model_len": engine.max_prompt_len + engine.max_new_tokens}]}}
        path = self.path.partition("?")[0]
        if path in replies:
            self._send(200, replies[path])
        else:
            self.send_error(404, f"{path} does not exist: expected GET {', '.join(replies)}, POST {', '.join(POSTS)}.")

    def do_POST(self):
        path, started = self.path.partition("?")[0], time.monotonic()
        try:
            body = self._read_body()
            if path not in POSTS:
                raise _RequestError(f"{path} does not exist: expected POST {', '.join(POSTS)}.", status=404)
            reply = POSTS[path](self.server.engine, self.server.run, body)
        except _RequestError as error:
            self._refuse(error.status, str(error), error.param, error.code)
            say(f"POST {path} {error.status}: {error}")
        except (ConnectionError, TimeoutError):  # the client's, see handle
            raise
        except Exception as error:  # noqa: BLE001 - whatever a request does, the server goes on for the others
            traceback.print_exc()
            self._refuse(500, f"the server failed: {type(error).__name__}: {str(error)[:500]}")
        else:
            self._send(200, reply)
            usage = reply.get("usage")
            did = f"{len(reply['choices'])} answers, {usage['completion_tokens']} tokens" if usage else reply["path"]
            say(f"POST {path} 200: {did}, {time.monotonic() - started:.2f} s")

    def _read_body(self):
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > _MAX_BODY_MIB << 20:
            self.close_connection = True  # what follows cannot be told from a next request
            raise _RequestError(f"Content-Length={length or None}: expected the body's size in bytes, at most "
                                f"{_MAX_BODY_MIB} MiB.", status=413 if length.isdecimal() else 411)
        data = self.rfile.read(int(length))
        try:
            body = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise _RequestError(f"the body is not JSON ({error}): expected one JSON object.") from None
        if not isinstance(body, dict):
            raise _RequestError("the body is no JSON object: expected one with the request's fields.")
        return body

    def send_error(self, code, message=None, explain=None):
        """What the base class refuses, bad methods and malformed HTTP, in the form of the other errors."""
        self.close_connection = True
        self._refuse(code, message or self.responses.get(code, ("refused",))[0])

    def _refuse(self, status, message, param=None, code=None):
        kind = "server_error" if status >= 500 else "not_found_error" if status == 404 else "invalid_request_error"
        self._send(status, {"error": {"message": message, "type": kind, "param": param, "code": code}})

    def _send(self, status, body):
        # What UTF-8 lacks, half of a surrogate pair in an unknown field's name, becomes JSON's own \udXXX.
        content = json.dumps(body, ensure_ascii=False, allow_nan=False).encode(errors="backslashreplace")
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        """Nothing: do_POST writes a line of its own."""


# ---- Start -----------------------------------------------------------------------------------------------------------

def main():
    parser = argparse.ArgumentParser(prog="python -m mindpangu.serve", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run, checkpoint or Hugging Face folder")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one (8000)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine only)")
    parser.add_argument("--device", choices=("CPU", "Ascend"), default="CPU", help="where to run (CPU)")
    parser.add_argument("--kernels", choices=("native", "reference"), default="native", help="see run.kernels (native)")
    parser.add_argument("--precision", default="float32", help="see run.precision (float32)")
    parser.add_argument("--num-slots", type=int, default=8, help="sequences generated at a time (8)")
    parser.add_argument("--max-prompt-len", type=int, default=0, help="tokens of a prompt (1024, or the model's rest)")
    parser.add_argument("--max-new-tokens", type=int, default=0, help="tokens of an answer (512, or half the model's)")
    parser.add_argument("--max-logprobs", type=int, default=20, help="the most that prompt_logprobs may be (20)")
    parser.add_argument("--seed", type=int, default=0, help="of the requests that name none (0)")
    arguments = parser.parse_args()
    try:
        if (min(arguments.max_prompt_len, arguments.max_new_tokens, arguments.seed) < 0 or
                min(arguments.num_slots, arguments.max_logprobs) < 1):
            raise ValueError(f"--max-prompt-len {arguments.max_prompt_len}, --max-new-tokens "
                             f"{arguments.max_new_tokens}, --seed {arguments.seed}, --num-slots {arguments.num_slots}, "
                             f"--max-logprobs {arguments.max_logprobs}: expected at least 0, 0, 0, 1 and 1.")
        folder = find_model(arguments.run)
        run = RunConfig(device=arguments.device, kernels=arguments.kernels, precision=arguments.precision)
        server = _listen(arguments.host, arguments.port)
        start(run)
        server.engine = Engine(folder, run, num_slots=arguments.num_slots, max_prompt_len=arguments.max_prompt_len,
                               max_new_tokens=arguments.max_new_tokens, max_logprobs=arguments.max_logprobs,
                               seed=arguments.seed)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host, port = server.server_address[:2]
    say(f"serving {folder} as {MODEL} at http://{host}:{port}/v1, prompts up to {server.engine.max_prompt_len} tokens, "
        f"answers up to {server.engine.max_new_tokens}")
    server.work()


def _listen(host, port):
    """The server, on its port, so that a taken one is known before the model is loaded; requests wait until then."""
    try:
        return _Server((host, port))
    except OSError as error:
        raise OSError(f"--host {host} --port {port}: cannot listen there ({error.strerror}); choose another --port."
                      ) from error
    except OverflowError as error:
        raise ValueError(f"--port {port}: expected 0 to 65535.") from error


if __name__ == "__main__":
    main()
