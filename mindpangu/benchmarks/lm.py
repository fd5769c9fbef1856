"""lm-eval's LM interface over a Pangu: log-likelihoods on packed rows, generation on the engine of model.generate.

Shapes are powers of two, so that few graphs are compiled. Every response is kept in a file under the tokens of its
request, see responses.py.
"""

import contextlib
import gc
import time
from collections import Counter

import mindspore as ms
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ..data.batches import tokenized_to_samples
from ..data.chat import ROLE_LABELS, decode_response, encode_chat, template_digest
from ..data.documents import Message
from ..data.tokenizer import SPECIAL_PIECES
from .responses import request_key

_SMALLEST_ROW = 128  # tokens: prompts and rows shorter than it share a graph
_STOP_STEP = 128  # tokens between looks for stop strings
_SECONDS_BETWEEN_SYNCS = 2


class ChatPrompt(str):
    """A conversation as text to show, which keeps its messages: special pieces are never looked for in text.

    messages: the last one is the assistant's, the answer so far, "" or a prefix that the task gives.
    """

    def __new__(cls, messages):
        special, text = SPECIAL_PIECES, SPECIAL_PIECES["bos"]
        for message in [] if messages[0].role == "system" else [Message("system", "")]:
            text += f"{special['turn_start']}{ROLE_LABELS[message.role]}{special['turn_end']}"
        for message in messages[:-1]:
            text += f"{special['turn_start']}{ROLE_LABELS[message.role]}{message.content}{special['turn_end']}"
        text += f"{special['turn_start']}{ROLE_LABELS['assistant']}{messages[-1].content}"
        prompt = super().__new__(cls, text)
        prompt.messages = tuple(messages)
        return prompt

    def tokens(self, tokenizer, continuation=""):
        """Token ids of the conversation with the assistant's turn still open."""
        last = self.messages[-1]
        answer = last._replace(content=last.content + continuation)
        return encode_chat(tokenizer, [*self.messages[:-1], answer]).tokens_T[:-1].tolist()


class PanguLM(TemplateLM):
    """model: a Pangu, not in training; tokenizer: its Tokenizer.

    num_slots: sequences generated side by side, and cache_tokens the positions that all caches may have together;
    batch_tokens: those of a forward pass that scores. seed: of sampled answers. responses: a ResponseFile of this
    model, or None. reporter(title, total, done): shows progress as runtime.metrics.Reporter does.
    sample_index: which of several samples of an answer is asked for; only sampled answers differ by it.
    """

    def __init__(self, model, tokenizer, *, num_slots=32, cache_tokens=1 << 18, batch_tokens=4096, logits_chunk=1024,
                 seed=0, mode="graph", responses=None, reporter=None):
        super().__init__()
        self.model, self.pieces = model, tokenizer
        self.num_slots, self.cache_tokens, self.batch_tokens = num_slots, cache_tokens, batch_tokens
        self.logits_chunk, self.seed, self.mode = logits_chunk, seed, mode
        self.responses, self.reporter = responses, reporter or _no_reporter
        self.max_length, self.max_gen_toks = model.config.max_seq_len, 256
        self.sample_index = 0
        self.measured = {}  # kind of request -> {"requests", "answered before", "tokens", "seconds", "cut prompts"}
        self._scorers, self._generators = {}, {}

    # ---- Text and tokens ---------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self):
        return self.pieces.eos_id

    @property
    def prefix_token_id(self):
        return self.pieces.bos_id

    @property
    def tokenizer_name(self):
        return f"{self.pieces.digest}-{template_digest()}"

    def chat_template(self, chat_template=False):
        return ChatPrompt([Message("user", "{user}"), Message("assistant", "")]) if chat_template else ""

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        """The system turn is empty unless chat_history has one."""
        messages = [Message(turn["role"], turn["content"]) for turn in chat_history]
        return ChatPrompt([*messages, Message("assistant", "")] if add_generation_prompt else messages)

    def tok_encode(self, string, add_special_tokens=None, **_):
        if isinstance(string, ChatPrompt):
            return string.tokens(self.pieces)
        return [self.pieces.bos_id] * (add_special_tokens is not False) + self.pieces.encode(string)

    def _encode_pair(self, context, continuation):
        if not isinstance(context, ChatPrompt):
            return super()._encode_pair(context, continuation)
        given = context.tokens(self.pieces)
        return given, context.tokens(self.pieces, continuation)[len(given):]

    def _text(self, prompt, tokens):
        """What an answer's tokens spell: in a chat without thoughts and turn end, elsewhere as the text goes on."""
        if isinstance(prompt, ChatPrompt):
            return decode_response(self.pieces, tokens).content
        tokens = tokens[:-1] if tokens and tokens[-1] == self.pieces.eos_id else tokens
        # Decoded alone, the text would lose a leading space: that of the dummy prefix.
        before = self.pieces.encode("\n")
        return self.pieces.decode([*before, *tokens])[len(self.pieces.decode(before)):]

    # ---- Log-likelihoods ---------------------------------------------------------------------------------------------

    def loglikelihood(self, requests, disable_tqdm=True):
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests, disable_tqdm=True):
        windows, owners = [], []
        for i, request in enumerate(requests):
            [text] = request.args
            for window in get_rolling_token_windows(self.pieces.encode(text), self.prefix_token_id, self.max_length - 1,
                                                    context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(i)
        sums = [0.0] * len(requests)
        for i, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[i] += logprob
        return sums

    def _loglikelihood_tokens(self, requests, **_):
        """[(text pair, context ids, continuation ids)] -> [(log-probability of the continuation, whether greedy)].

        What exceeds the model's positions is cut at the start of the context.
        """
        keys, pending, num_cut = [], {}, 0
        for _, context, continuation in requests:
            tokens = [*context, *continuation]
            num_cut += len(tokens) > self.max_length
            tokens = tokens[-self.max_length:]
            start = max(1, len(tokens) - len(continuation))
            key = request_key("loglikelihood", tokens, start)
            keys.append(key)
            if self._known(key) is None:
                pending[key] = (np.array(tokens, np.int32), start)
        found, order = {}, sorted(pending, key=lambda key: -len(pending[key][0]))
        with self._measuring("loglikelihood", keys, pending, num_cut) as (count, report):
            while order:
                row_len = self._row_len(len(pending[order[0]][0]))
                # As many as fill some forward passes: what a kill loses, and what the progress shows.
                batch, room = [], 16 * max(self.batch_tokens, row_len)
                while order and room >= len(pending[order[0]][0]) > row_len // 2 * (row_len > _SMALLEST_ROW):
                    key = order.pop(0)
                    room -= len(pending[key][0])
                    batch.append(key)
                scored = self._score([pending[key] for key in batch], row_len)
                found |= self._keep(dict(zip(batch, scored, strict=True)))
                count(sum(len(pending[key][0]) for key in batch))
                report(len(pending) - len(order))
        return [tuple(found.get(key) or self._known(key)) for key in keys]

    def _row_len(self, length):
        return min(max(_SMALLEST_ROW, _power_of_two(length)), self.max_length)

    def _score(self, sequences, row_len):
        """[[log-probability, greedy or not]] of the tokens from `start` on of each (tokens, start)."""
        from ..model.logprobs import LogprobScorer

        if row_len not in self._scorers:
            self._scorers[row_len] = LogprobScorer(self.model, row_len=row_len,
                                                   num_rows=max(1, self.batch_tokens // row_len),
                                                   chunk_size=self.logits_chunk, mode=self.mode)
        samples = tokenized_to_samples([(tokens, np.arange(len(tokens)) >= start) for tokens, start in sequences])
        logprobs, _, is_top = self._scorers[row_len].score(samples)
        ends = np.cumsum([len(tokens) - start for tokens, start in sequences])
        spans = [slice(end - len(tokens) + start, end) for end, (tokens, start) in zip(ends, sequences, strict=True)]
        return [[float(np.asarray(logprobs[span], np.float64).sum()), bool(np.all(is_top[span]))] for span in spans]

    # ---- Generation --------------------------------------------------------------------------------------------------

    def generate_until(self, requests, disable_tqdm=True):
        """Texts up to the first of the stop strings, which are looked for in the text, not among the tokens.

        The generation arguments are until, max_gen_toks, do_sample, temperature, top_p and top_k; others are refused.
        An answer may have what its prompt leaves of the model's positions; of a prompt that leaves less than
        max_gen_toks and half of them, the start is cut. A sampled request that comes several times, as lm-eval's
        repeats do, gets an answer of its own each time.
        """
        keys, pending, num_cut, times_asked = [], {}, 0, Counter()
        for request in requests:
            prompt, arguments = request.args
            until, max_new, *sampling = _generation_arguments(arguments, self.max_gen_toks)
            tokens = self.tok_encode(prompt)
            room = min(max_new, max(self.max_length - len(tokens), self.max_length // 2))
            if room < max_new:  # the same few shapes for all of them
                room = room // _SMALLEST_ROW * _SMALLEST_ROW or _power_of_two(room + 1) // 2
            num_cut += len(tokens) > self.max_length - room
            tokens = tokens[-(self.max_length - room):]
            drawn = [self.seed, self.sample_index] if sampling[0] > 0 else []
            key = request_key("generate_until", tokens, until, room, sampling, drawn, isinstance(prompt, ChatPrompt))
            times_asked[key] += 1
            if drawn and times_asked[key] > 1:
                key = request_key(key, times_asked[key])
            keys.append(key)
            if self._known(key) is None:
                pending[key] = _Answer(prompt, tokens, until, max_new, room, tuple(sampling))
        answers = dict(pending)
        with self._measuring("generate_until", keys, pending, num_cut) as (count, report):
            while pending:
                self._generate_some(pending, count, lambda: report(len(answers) - len(pending)))
        return [self._cut(request.args[0], _generation_arguments(request.args[1], self.max_gen_toks)[0],
                          answers[key].tokens if key in answers else self._known(key))
                for key, request in zip(keys, requests, strict=True)]

    def _cut(self, prompt, until, tokens):
        text = self._text(prompt, tokens)
        for stop in until:
            text = text.split(stop)[0]
        return text

    def _generate_some(self, pending, count, report):
        """Let the answers that fit in one compiled shape go on for some tokens; take the finished ones out of pending.

        An answer goes on until it ends, has no room or holds a stop string; those without stop strings go on at once as
        far as they may.
        """
        shapes = {key: self._shape(answer) for key, answer in pending.items()}
        # Those that have gone on least, so that the rest of several shapes goes on together; of them the longest:
        # memory runs out at once or never, and the time left is not too low.
        first = min(pending, key=lambda key: (pending[key].num_parts, -shapes[key][0] - shapes[key][1], shapes[key]))
        shape = shapes[first]
        chosen = [key for key in pending if shapes[key] == shape]
        generator = self._generator(shape, len(chosen))
        finished, synced = {}, time.monotonic()

        def on_answer(i, generated):
            nonlocal finished, synced
            answer = pending[chosen[i]]
            taken = generated.tokens[:answer.room - len(answer.tokens)].tolist()
            answer.tokens += taken
            count(len(taken))
            ended = taken[-1] == self.pieces.eos_id or len(answer.tokens) >= answer.room
            if ended or answer.until and any(stop in self._text(answer.prompt, answer.tokens) for stop in answer.until):
                finished[chosen[i]] = answer.tokens
            if time.monotonic() - synced > _SECONDS_BETWEEN_SYNCS:
                self._finish(pending, finished, report)
                finished, synced = {}, time.monotonic()

        prompts = [np.array(pending[key].prompt_tokens + pending[key].tokens, np.int32) for key in chosen]
        count(sum(map(len, prompts)))
        # Every answer has its own random numbers, which do not depend on what else is asked for; other ones every time
        # that it goes on.
        draws = None
        if shape[2][0] > 0:
            draws = [(self.seed, int(key[:10], 16), (self.sample_index << 12) + pending[key].num_parts)
                     for key in chosen]
        for key in chosen:
            pending[key].num_parts += 1
        generator.generate(prompts, draws, on_answer)
        self._finish(pending, finished, report)

    def _finish(self, pending, finished, report):
        self._keep(finished)
        for key in finished:
            del pending[key]
        report()

    def _shape(self, answer):
        """(prompt length, answer length, sampling) of the Generator that takes the answer further."""
        length, step = len(answer.prompt_tokens) + len(answer.tokens), answer.room - len(answer.tokens)
        if answer.until:  # a step as long as the answer so far: at most half of the tokens stand behind a stop string
            step = min(step, max(_STOP_STEP, _power_of_two(len(answer.tokens))))
        if answer.room < answer.max_new:  # as far as the positions go, in few shapes
            step = _power_of_two(step + 1) // 2
        return min(max(_SMALLEST_ROW, _power_of_two(length)), self.max_length - step), step, answer.sampling

    def _generator(self, shape, num_prompts):
        from ..model.generate import Generator

        prompt_len, step, (temperature, top_p, top_k) = shape
        num_slots = min(self.num_slots, _power_of_two(num_prompts), max(1, self.cache_tokens // (prompt_len + step)))
        if (*shape, num_slots) not in self._generators:
            held = sum(slots * (prompt + new) for prompt, new, _, slots in self._generators)
            if held and held + num_slots * (prompt_len + step) > self.cache_tokens:
                self._generators.clear()
                gc.collect()
                # A compiled graph holds its Parameters, the caches, until MindSpore forgets all graphs.
                ms.ms_memory_recycle()
            self._generators[(*shape, num_slots)] = Generator(
                self.model, num_slots=num_slots, prompt_len=prompt_len, max_new_tokens=step, eos_id=self.pieces.eos_id,
                pad_id=self.pieces.pad_id, temperature=temperature, top_p=top_p, top_k=top_k, mode=self.mode)
        return self._generators[(*shape, num_slots)]

    # ---- What is known already, and how fast the rest goes -----------------------------------------------------------

    def _known(self, key):
        return None if self.responses is None else self.responses.get(key)

    def _keep(self, found):
        if self.responses is not None and found:
            self.responses.add(found)
        return found

    @contextlib.contextmanager
    def _measuring(self, kind, keys, pending, num_cut):
        """count(tokens) and report(done) for the requests of a kind that have to be answered, the pending ones."""
        numbers = self.measured.setdefault(kind, {"requests": 0, "answered_before": 0, "cut_prompts": 0, "tokens": 0,
                                                  "seconds": 0.0})
        numbers["requests"] += len(keys)
        numbers["answered_before"] += sum(key not in pending for key in keys)
        numbers["cut_prompts"] += num_cut
        started, before = time.monotonic(), numbers["seconds"]
        known = len(keys) - len(pending)  # or asked for twice
        with self.reporter(f"{kind} requests", len(keys), known) as reporter:
            def count(tokens):
                numbers["tokens"] += tokens
                numbers["seconds"] = before + time.monotonic() - started

            yield count, lambda done: reporter.advance(known + done)
        count(0)


class _Answer:
    """An answer on its way."""

    def __init__(self, prompt, prompt_tokens, until, max_new, room, sampling):
        self.prompt, self.prompt_tokens, self.until, self.sampling = prompt, prompt_tokens, until, sampling
        self.max_new, self.room = max_new, room  # tokens it may have by the task, and by the model's positions too
        self.tokens, self.num_parts = [], 0


class _NoReporter:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def advance(self, done):
        pass


def _no_reporter(title, total, done):
    return _NoReporter()


def _power_of_two(number):
    """The smallest one that is not below the number."""
    return 1 << max(0, int(number) - 1).bit_length()


def _generation_arguments(arguments, max_gen_toks):
    """(stop strings, tokens at most, temperature, top_p, top_k); temperature 0 is greedy."""
    known = {"until", "max_gen_toks", "max_new_tokens", "do_sample", "temperature", "top_p", "top_k"}
    unknown = sorted(set(arguments) - known)
    if unknown:
        raise ValueError(f"generation arguments {unknown} are unknown: expected some of {sorted(known)}.")
    until = arguments.get("until") or []
    until = [until] if isinstance(until, str) else [stop for stop in until if stop]
    max_new = arguments.get("max_gen_toks", arguments.get("max_new_tokens", max_gen_toks))
    temperature = float(arguments.get("temperature", 1.0 if arguments.get("do_sample") else 0.0))
    if not arguments.get("do_sample", temperature > 0):
        temperature = 0.0
    if temperature == 0:
        return until, int(max_new), 0.0, 1.0, 0
    return until, int(max_new), temperature, float(arguments.get("top_p", 1.0)), max(0, int(arguments.get("top_k", 0)))
