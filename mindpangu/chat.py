"""Talk to a trained model: python -m mindpangu.chat RUN ["prompt" ...]   or   --mindir FOLDER ["prompt" ...]

RUN is a run folder, a checkpoint or a Hugging Face folder with tokenizer.model; --mindir takes what python -m
mindpangu.export wrote. With prompts, each is answered by itself; without, a conversation goes on line by line: /reset
forgets it, /exit or Ctrl-D ends it, Ctrl-C stops an answer. --bench 1024,256 measures instead.
"""
# ruff: noqa: E402
import signal

if __name__ == "__main__":
    # Before any thread starts, for threads inherit it: MindSpore ends the process on a SIGINT that finds it at work.
    # Answers wait for the signal in a thread of their own, see _Interrupts.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})

import argparse
import contextlib
import os
import sys
import threading
import time
from pathlib import Path

from mindpangu.config import RunConfig
from mindpangu.data.chat import decode_response, encode_prompt
from mindpangu.data.documents import Message
from mindpangu.data.tokenizer import Tokenizer
from mindpangu.model.mindir import read_key
from mindpangu.model.runner import GraphRunner, ModelRunner, lite_graphs, measure, stream
from mindpangu.model.uniforms import uniforms
from mindpangu.runtime.checkpoint import find_model
from mindpangu.runtime.device import activation_dtype, start
from mindpangu.runtime.metrics import peak_memory_gib, say

_CACHE_LEN = 4096  # of a checkpoint's runner, where its model takes as many
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
_INCOMPLETE = "\ufffd"  # what the first bytes of a character decode to


# ---- Ctrl-C ----------------------------------------------------------------------------------------------------------

class _Interrupts:
    """What Ctrl-C does: it ends the program while a model loads, an answer, or the line that is being typed."""

    def __init__(self):
        self.stop = threading.Event()  # the answer
        self.ends_program = True
        self._is_prompting = False
        threading.Thread(target=self._wait, daemon=True).start()

    def _wait(self):
        while True:
            signal.sigwait({signal.SIGINT})
            if self.ends_program:
                print(flush=True)
                os._exit(130)  # 128 + SIGINT; the main thread may be in a call that takes minutes
            if self._is_prompting:  # either thread may have been given the signal
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            self.stop.set()

    @contextlib.contextmanager
    def at_the_prompt(self):
        """KeyboardInterrupt, which ends an input(); MindSpore leaves a handler of its own, which ends the process."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self._is_prompting = True
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            self._is_prompting = False


# ---- Answers ---------------------------------------------------------------------------------------------------------

class _Screen:
    """Shows an answer as it grows; thoughts dimmed on a terminal, in brackets elsewhere."""

    def __init__(self, is_terminal):
        self._marks = {"open": _DIM, "close": _PLAIN + "\n"} if is_terminal else {"open": "[", "close": "]\n"}
        self._thoughts = self._content = ""
        self._state = "begin"  # then "thoughts", where there are any, then "content"

    def show(self, message, is_whole=False):
        """message: the answer so far, an extension of the one before. What may yet change waits."""
        if message.thoughts is not None and self._state == "begin":
            self._state = "thoughts"
            self._write(self._marks["open"])
        if self._state == "thoughts":
            ends = is_whole or bool(message.content)
            self._thoughts = self._extend(self._thoughts, message.thoughts, ends)
            if ends:
                self._state = "content"
                self._write(self._marks["close"])
        self._content = self._extend(self._content, message.content, is_whole)

    def _extend(self, shown, text, is_whole):
        text = text if is_whole else text.rstrip(_INCOMPLETE)
        self._write(text[len(shown):])
        return text if len(text) > len(shown) else shown

    def _write(self, text):
        sys.stdout.write(text)
        sys.stdout.flush()


class Chat:
    """A runner and its tokenizer, and how it answers."""

    def __init__(self, runner, tokenizer, *, max_new_tokens, temperature, seed):
        self.runner, self.tokenizer = runner, tokenizer
        self.max_new_tokens, self.temperature, self.seed = max_new_tokens, temperature, seed

    def answer(self, messages, number=0, stop=None):
        """Write the answer to a conversation; returns it as a Message. number: which of the seed's answers it is."""
        prompt = encode_prompt(self.tokenizer, messages)
        screen = _Screen(sys.stdout.isatty())
        tokens, message = [], Message("assistant", "")
        for token in stream(self.runner, prompt, eos_id=self.tokenizer.turn_end_id, max_new_tokens=self.max_new_tokens,
                            temperature=self.temperature, numbers=uniforms(self.seed, number, 0, self.max_new_tokens)):
            tokens.append(token)
            message = decode_response(self.tokenizer, tokens)
            screen.show(message)
            if stop is not None and stop.is_set():
                break
        screen.show(message, is_whole=True)
        return message


def converse(chat, system, interrupts):
    """Lines from the terminal, answers to it, until /exit or the end of the input."""
    conversation, number = list(system), 0
    interrupts.ends_program = False
    while True:
        try:
            with interrupts.at_the_prompt():
                line = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(/exit or Ctrl-D ends the chat)")
            continue
        if line == "/exit":
            return
        if line == "/reset":
            conversation = list(system)
            print("(the conversation starts anew)")
        elif line.startswith("/"):
            print("(/reset forgets the conversation, /exit ends the chat)")
        elif line:
            conversation.append(Message("user", line))
            interrupts.stop.clear()
            try:
                conversation.append(chat.answer(conversation, number, interrupts.stop))
            except ValueError as error:
                conversation.pop()
                print(f"({error} /reset forgets the conversation.)")
                continue
            print("\n(stopped)" if interrupts.stop.is_set() else "")
            number += 1


# ---- Command line ----------------------------------------------------------------------------------------------------

def _parse(arguments):
    parser = argparse.ArgumentParser(prog="python -m mindpangu.chat", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", help="run, checkpoint or Hugging Face folder; none with --mindir")
    parser.add_argument("prompts", nargs="*", help="what the user says; without, read from the terminal")
    parser.add_argument("--mindir", metavar="FOLDER", help="an export instead of a run")
    parser.add_argument("--lite", metavar="FILE", help="with --mindir: what converter_lite wrote, on a device through "
                                                       "MindSpore Lite (not run by the authors)")
    parser.add_argument("--key-file", help="of an encrypted export: a file with its key in hexadecimal")
    parser.add_argument("--key-env", metavar="VARIABLE", help="or the environment variable that holds it")
    parser.add_argument("--system", default="", help="the system message (empty)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer (256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the most likely answer (0)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (0)")
    parser.add_argument("--device", choices=("CPU", "Ascend"), default="CPU", help="where a run's model runs (CPU)")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32",
                        help="a run's weights in memory (float32)")
    parser.add_argument("--kernels", choices=("native", "reference"), default="native",
                        help="native: the CPU library, built with g++ once; reference: MindSpore's own (native)")
    parser.add_argument("--bench", metavar="PROMPT,ANSWER", help="measure answers of so many tokens to prompts of so "
                                                                 "many, for example 1024,256")
    parsed = parser.parse_args(arguments)
    if parsed.mindir and parsed.run:  # argparse takes the first prompt for it
        parsed.run, parsed.prompts = None, [parsed.run, *parsed.prompts]
    return parsed


def _open(options):
    """(runner, tokenizer) that the options ask for. Raises ValueError for options that do not fit together."""
    if not options.mindir:
        if options.run is None:
            raise ValueError("a run folder is missing: python -m mindpangu.chat RUN, or --mindir FOLDER for an export.")
        given = [name for name in ("lite", "key_file", "key_env") if getattr(options, name)]
        if given:
            raise ValueError(f"--{given[0].replace('_', '-')} belongs to --mindir FOLDER.")
        folder = find_model(options.run)
        run = RunConfig(device=options.device, kernels=options.kernels, precision=options.precision)
        start(run)
        from mindpangu.model.weights import load_model

        model = load_model(folder, activation_dtype(run), "bfloat16" if run.precision == "bfloat16" else None)
        runner = ModelRunner(model, min(_CACHE_LEN, model.config.max_seq_len))
        return runner, Tokenizer(folder / "tokenizer.model")
    if options.device != "CPU":
        raise ValueError("--device Ascend with --mindir: MindSpore itself runs the graphs on a CPU; on a device give "
                         "--lite FILE, the converted graph.")
    key = read_key(options.key_file, options.key_env, os.environ)
    folder = Path(options.mindir)
    if options.lite:
        runner = GraphRunner(folder, key, lite_graphs(options.lite))
    else:
        start(RunConfig(kernels=options.kernels), runs_ops=False)
        runner = GraphRunner(folder, key)
    return runner, Tokenizer(folder / "tokenizer.model")


def bench(runner, tokenizer, lengths, load_s, device):
    """Print what an answer costs."""
    prompt_len, answer_len = lengths
    times = measure(runner, prompt_len, answer_len, tokenizer.vocab_size)
    say(f"{prompt_len} tokens in, {answer_len} out, one at a time, on this machine:")
    say(f"  to the first token   {1e3 * times.first_token_s:9.1f} ms")
    say(f"  each further token   {1e3 * times.per_token_s:9.1f} ms   {1 / times.per_token_s:.1f} tokens/s")
    say(f"  peak memory          {peak_memory_gib(device):9.2f} GiB")
    say(f"  to load              {load_s:9.1f} s")


def _lengths(text):
    """(prompt, answer) of --bench."""
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"--bench {text}: expected two numbers of tokens, for example 1024,256.")
    return int(parts[0]), int(parts[1])


def main():
    interrupts = _Interrupts()
    options = _parse(sys.argv[1:])
    try:
        if options.max_new_tokens < 1 or options.temperature < 0:
            raise ValueError(f"--max-new-tokens {options.max_new_tokens}, --temperature {options.temperature}: "
                             "expected at least 1 and at least 0.")
        lengths = _lengths(options.bench) if options.bench else None
        started = time.monotonic()
        runner, tokenizer = _open(options)
        if lengths:
            bench(runner, tokenizer, lengths, time.monotonic() - started, options.device)
            return
        chat = Chat(runner, tokenizer, max_new_tokens=options.max_new_tokens, temperature=options.temperature,
                    seed=options.seed)
        system = [Message("system", options.system)] if options.system else []
        if not options.prompts:
            converse(chat, system, interrupts)
        for number, prompt in enumerate(options.prompts):
            print(f"> {prompt}")
            chat.answer([*system, Message("user", prompt)], number)
            print("\n")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
