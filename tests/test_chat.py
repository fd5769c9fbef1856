"""python -m mindpangu.chat: answers, a conversation in a real pseudo-terminal, Ctrl-C, measurements, wrong options."""

import contextlib
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from mindpangu.chat import _lengths, _Screen
from mindpangu.config import load_recipe
from mindpangu.data.chat import decode_response, encode_prompt
from mindpangu.data.corpus import load_corpus
from mindpangu.data.documents import Message
from mindpangu.data.tokenizer import Tokenizer
from mindpangu.model.runner import ModelRunner, choose, measure, stream
from mindpangu.model.uniforms import uniforms
from mindpangu.runtime.checkpoint import find_model

DIM, PLAIN = "\x1b[2m", "\x1b[0m"


@pytest.fixture(scope="module")
def trained(memorised_run):
    return find_model(memorised_run)


@pytest.fixture(scope="module")
def problems():
    """Two of the problems that the model knows, as one line each."""
    data = load_recipe(["recipe=sft_reasoning", "scale=smoke", "init_from=null", "data.num_examples=20"]).data
    return [example.messages for example in load_corpus(data).train[:2]]


@pytest.fixture(scope="module")
def rambling(trained, cpu_library, tmp_path_factory):
    """A Hugging Face folder with random weights, whose answers do not end."""
    import mindspore as ms

    from mindpangu.model.pangu import Pangu
    from mindpangu.model.weights import read_config, save_weights

    ms.set_device("CPU")
    folder = tmp_path_factory.mktemp("rambling") / "hf"
    save_weights(Pangu(read_config(trained), seed=3), folder)
    shutil.copyfile(trained / "tokenizer.model", folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="module")
def exports(rambling, trained, tmp_path_factory):
    """{"checkpoint" | "mindir": {"knows" | "rambles": the arguments that open it}}."""
    home = tmp_path_factory.mktemp("exports")
    arguments = {"checkpoint": {"knows": [trained], "rambles": [rambling]}, "mindir": {}}
    for name, folder in (("knows", trained), ("rambles", rambling)):
        done = subprocess.run([sys.executable, "-m", "mindpangu.export", "recipe=export_mindir", f"from={folder}",
                               "export.buckets=[64,256]", "export.cache_len=1000", "export.hugging_face=null",
                               f"run.dir={name}"], cwd=home, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        arguments["mindir"][name] = ["--mindir", home / name]
    return arguments


class Terminal:
    """The chat in a pseudo-terminal of its own, as in a shell."""

    def __init__(self, *arguments):
        self.process, self.file = pty.fork()
        if self.process == 0:
            os.execv(sys.executable, [sys.executable, "-m", "mindpangu.chat", *map(str, arguments)])
        self._unread = b""

    def type(self, text):
        os.write(self.file, text.encode())

    def read_to(self, pattern, timeout_s=180):
        """What appeared up to the end of a match, newlines as in Python."""
        deadline = time.monotonic() + timeout_s
        while not (found := re.search(pattern.encode(), self._unread.replace(b"\r\n", b"\n"))):
            ready, _, _ = select.select([self.file], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"no {pattern!r} in {self._unread!r}")
            try:
                self._unread += os.read(self.file, 1 << 16)
            except OSError:
                raise AssertionError(f"the chat ended before {pattern!r}: {self._unread!r}") from None
        text = self._unread.replace(b"\r\n", b"\n")
        self._unread = text[found.end():]
        return text[:found.end()].decode()

    def interrupt(self, expected, text="\x03"):
        """Ctrl-C until it shows: Python's input() loses one that comes between its prompt and its read."""
        for _ in range(30):
            self.type(text)
            with contextlib.suppress(TimeoutError):
                return self.read_to(expected, timeout_s=4)
        raise AssertionError(f"no {expected!r} in {self._unread!r}")

    def wait(self):
        """Exit code, or minus the signal."""
        status = os.waitpid(self.process, 0)[1]
        os.close(self.file)
        return os.waitstatus_to_exitcode(status)


PROMPT = r"(?:^|\n)> $"


@pytest.mark.parametrize("kind", ["checkpoint", "mindir"])
def test_a_conversation_streams_dims_thoughts_remembers_and_forgets(kind, exports, trained, problems):
    terminal = Terminal(*exports[kind]["knows"])
    terminal.read_to(PROMPT)
    answers = []
    for line in (problems[0][-2].content, problems[1][-2].content, "/reset", problems[1][-2].content):
        terminal.type(line + "\n")
        answers.append(terminal.read_to(PROMPT).partition("\n")[2].removesuffix("> ").strip())
    assert answers[2] == "(the conversation starts anew)"
    for shown, reference in ((answers[0], problems[0][-1]), (answers[3], problems[1][-1])):
        assert shown == f"{DIM}{reference.thoughts}{PLAIN}\n{reference.content}"
    tokenizer, runner = Tokenizer(trained / "tokenizer.model"), model_runner(trained)

    def full_answer(messages):
        tokens = list(stream(runner, encode_prompt(tokenizer, messages), eos_id=tokenizer.turn_end_id,
                             max_new_tokens=256))
        return decode_response(tokenizer, tokens)

    first = full_answer(problems[0][:-1])
    second = full_answer([*problems[0][:-1], first, problems[1][-2]])
    assert answers[1].replace(DIM, "").replace(PLAIN, "") == "\n".join(
        part for part in (second.thoughts, second.content) if part), "the second answer has to see the first turn"
    terminal.type("/help\n")
    assert "/exit ends the chat" in terminal.read_to(PROMPT)
    terminal.type("/exit\n")
    assert terminal.wait() == 0


@pytest.mark.parametrize("kind", ["checkpoint", "mindir"])
def test_ctrl_c_stops_an_answer_and_not_the_program(kind, exports):
    terminal = Terminal(*exports[kind]["rambles"], "--max-new-tokens", 900)
    terminal.read_to(PROMPT)
    for _ in range(2):
        terminal.type("Hello\n")
        terminal.read_to("Hello\n.*\\S")  # it has begun to answer
        started = time.monotonic()
        terminal.type("\x03")
        assert "(stopped)" in terminal.read_to(PROMPT)
        stopped_s = time.monotonic() - started
    for text in ("\x03", "half a line\x03"):
        terminal.interrupt(r"/exit or Ctrl-D ends the chat\)\n> $", text)
    terminal.type("/reset\n")
    assert "starts anew" in terminal.read_to(PROMPT)
    terminal.type("\x04")  # Ctrl-D
    assert terminal.wait() == 0
    assert stopped_s < 60, "the answer was not cut short"


def test_ctrl_c_ends_the_program_while_it_loads(rambling):
    terminal = Terminal(rambling)
    terminal.read_to("device CPU")  # MindSpore is being imported
    terminal.type("\x03")
    assert terminal.wait() == 128 + signal.SIGINT


def model_runner(folder, cache_len=512):
    from mindpangu.model.weights import load_model

    return ModelRunner(load_model(folder), cache_len)


def chat(*arguments, cwd):
    return subprocess.run([sys.executable, "-m", "mindpangu.chat", *map(str, arguments)], cwd=cwd, capture_output=True,
                          text=True)


def test_prompts_on_the_command_line_are_answered_each_by_itself(exports, problems, tmp_path):
    questions = [messages[-2].content for messages in problems]
    printed = {kind: chat(*arguments["knows"], *questions, cwd=tmp_path).stdout for kind, arguments in exports.items()}
    kernels = r"^  attention +native +CPU library"  # of a model's ops, of which an export has none
    assert re.search(kernels, printed["checkpoint"], re.MULTILINE)
    assert "device CPU" in printed["mindir"] and "attention" not in printed["mindir"]
    for text in printed.values():
        shown = text[text.index("> "):]
        assert shown == "".join(f"> {question}\n[{messages[-1].thoughts}]\n{messages[-1].content}\n\n"
                                for question, messages in zip(questions, problems, strict=True))


def test_the_benchmark_prints_latencies_and_memory(exports, tmp_path):
    for arguments in exports.values():
        done = chat(*arguments["rambles"], "--bench", "60,20", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        numbers = dict(re.findall(r"^ +(to the first token|each further token|peak memory|to load) +([\d.]+)",
                                  done.stdout, re.MULTILINE))
        assert len(numbers) == 4 and all(float(number) > 0 for number in numbers.values())
        assert "60 tokens in, 20 out" in done.stdout


class Counting:
    """A runner with known delays and calls."""

    cache_len = 30

    def __init__(self):
        self.calls = []

    def prefill(self, tokens):
        self.calls.append(len(tokens))
        time.sleep(0.2)
        return np.eye(9, dtype=np.float32)[5]

    def decode(self, token):
        self.calls.append(token)
        time.sleep(0.02)
        return np.eye(9, dtype=np.float32)[5]


def test_measured_times_leave_out_the_call_that_compiles():
    runner = Counting()
    times = measure(runner, 12, 11, 9)
    assert runner.calls == [12, 5, 12, *[5] * 10]
    assert times.first_token_s >= 0.2 and times.per_token_s >= 0.02
    for lengths in ((25, 7), (12, 1)):
        with pytest.raises(ValueError, match="expected at least 2 in the answer, and 31 together"):
            measure(runner, *lengths, 9)


def test_a_checkpoints_runner_gives_the_logits_of_transformers_at_every_bucket(trained):
    import torch
    from transformers import LlamaForCausalLM

    llama, runner = LlamaForCausalLM.from_pretrained(trained).double(), model_runner(trained, cache_len=150)
    for length in (1, 64, 65, 128, 129, 149):
        tokens = np.random.default_rng(length).integers(3, llama.config.vocab_size, length + 1).astype(np.int32)
        with torch.no_grad():
            truth = llama(torch.tensor(tokens[None], dtype=torch.long)).logits[0].numpy()
        for logits, row in zip((runner.prefill(tokens[:-1]), runner.decode(tokens[-1])), truth[-2:], strict=True):
            np.testing.assert_allclose(logits, row, atol=1e-4 * np.abs(row).max())
    for length in (0, 150):
        with pytest.raises(ValueError, match=f"the prompt has {length} tokens: expected 1 to 149"):
            runner.prefill(np.ones(length, np.int32))


# ---- Sampling --------------------------------------------------------------------------------------------------------

def test_tokens_are_drawn_by_their_probability_and_the_most_likely_without_temperature():
    logits = np.log(np.array([0.1, 0.6, 0.3], np.float32))
    assert choose(logits, 0, None) == 1
    numbers = uniforms(0, 0, 0, 4000)
    drawn = np.bincount([choose(logits, 1.0, number) for number in numbers], minlength=3) / 4000
    assert np.abs(drawn - [0.1, 0.6, 0.3]).max() < 5 * np.sqrt(0.25 / 4000)
    assert [choose(logits, 1.0, number) for number in (0.0, 0.59, 0.61, 0.89, 0.91, 1 - 2**-23)] == [1, 1, 2, 2, 0, 0]
    sharp = np.exp(2 * np.log([0.1, 0.6, 0.3]))  # temperature 0.5 squares the shares
    drawn = np.bincount([choose(logits, 0.5, number) for number in numbers], minlength=3) / 4000
    assert np.abs(drawn - sharp / sharp.sum()).max() < 5 * np.sqrt(0.25 / 4000)


def test_logits_that_are_not_finite_are_an_error():
    for bad in (np.inf, np.nan):
        with pytest.raises(ValueError, match="logits are not finite: .* too large for float16"):
            choose(np.array([1.0, bad], np.float32), 0, None)


def test_a_seed_draws_its_answer(rambling, tmp_path):
    tokenizer, runner = Tokenizer(rambling / "tokenizer.model"), model_runner(rambling)
    prompt, answers = encode_prompt(tokenizer, [Message("user", "Hi")]), {}
    for seed in (1, 2):
        tokens = list(stream(runner, prompt, eos_id=tokenizer.turn_end_id, max_new_tokens=12, temperature=1.0,
                             numbers=uniforms(seed, 0, 0, 12)))
        answers[seed] = decode_response(tokenizer, tokens).content
    assert answers[1] != answers[2]
    done = chat(rambling, "Hi", "--temperature", 1, "--seed", 2, "--max-new-tokens", 12, cwd=tmp_path)
    assert done.stdout.partition("> ")[2] == f"Hi\n{answers[2]}\n\n"


def test_the_system_message_stands_before_the_conversation(trained, problems, tmp_path):
    tokenizer, runner = Tokenizer(trained / "tokenizer.model"), model_runner(trained)
    question, shown = problems[0][-2], []
    for system in ([], [Message("system", "Be brief.")]):
        tokens = list(stream(runner, encode_prompt(tokenizer, [*system, question]), eos_id=tokenizer.turn_end_id,
                             max_new_tokens=40))
        answer = decode_response(tokenizer, tokens)
        shown.append((f"[{answer.thoughts}]\n" if answer.thoughts is not None else "") + answer.content)
    assert shown[0] != shown[1]
    done = chat(trained, question.content, "--system", "Be brief.", "--max-new-tokens", 40, cwd=tmp_path)
    assert done.stdout.partition("> ")[2] == f"{question.content}\n{shown[1]}\n\n"


# ---- The screen ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("is_terminal", [True, False])
def test_what_is_shown_piece_by_piece_is_the_whole_and_never_half_a_character(trained, capsys, is_terminal):
    tokenizer = Tokenizer(trained / "tokenizer.model")
    tokens = [tokenizer.think_open_id, *tokenizer.encode("想 😀 it over"), tokenizer.think_close_id,
              *tokenizer.encode("答案 é 7"), tokenizer.turn_end_id]
    assert len(tokens) > 12, "characters have to come in several bytes"
    screen, pieces = _Screen(is_terminal), []
    for count in range(1, len(tokens) + 1):
        screen.show(decode_response(tokenizer, tokens[:count]))
        pieces.append(capsys.readouterr().out)
    screen.show(decode_response(tokenizer, tokens), is_whole=True)
    pieces.append(capsys.readouterr().out)
    assert "\ufffd" not in "".join(pieces) and sum(map(bool, pieces)) > 5
    opened, closed = (DIM, PLAIN + "\n") if is_terminal else ("[", "]\n")
    assert "".join(pieces) == f"{opened}想 😀 it over{closed}答案 é 7"


def test_an_answer_that_is_stopped_within_its_thoughts_closes_them(trained, capsys):
    tokenizer = Tokenizer(trained / "tokenizer.model")
    tokens = [tokenizer.think_open_id, *tokenizer.encode("so far")]
    screen = _Screen(is_terminal=True)
    screen.show(decode_response(tokenizer, tokens))
    screen.show(decode_response(tokenizer, tokens), is_whole=True)
    assert capsys.readouterr().out == f"{DIM}so far{PLAIN}\n"


# ---- Wrong options ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("arguments", "words"), [
    ([], "a run folder is missing: python -m mindpangu.chat RUN, or --mindir FOLDER"),
    (["absent", "Hi"], "absent: expected a run folder with a checkpoint"),
    (["absent", "--bench", "5"], "--bench 5: expected two numbers of tokens, for example 1024,256"),
    (["absent", "--max-new-tokens", "0"], "--max-new-tokens 0"),
    (["absent", "--lite", "x"], "--lite belongs to --mindir FOLDER"),
    (["absent", "--key-file", "x"], "--key-file belongs to --mindir FOLDER"),
    (["--mindir", "absent", "--device", "Ascend"], "on a device give --lite FILE"),
    (["--mindir", "absent", "--key-file", "x"], "key file x does not exist"),
    (["--mindir", ".", "--lite", "x", "Hi"], "no export: it has no manifest.json"),
])
def test_wrong_options_are_one_clear_line(arguments, words, tmp_path):
    done = chat(*arguments, cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and words in done.stderr


def test_lengths_of_a_benchmark():
    assert _lengths("1024,256") == (1024, 256) and _lengths("8, 2") == (8, 2)
    for text in ("1,0", "a,b", "1,2,3", "-1,5"):
        with pytest.raises(ValueError, match="--bench .*expected two numbers"):
            _lengths(text)


def test_a_long_conversation_says_how_to_go_on(exports):
    terminal = Terminal(*exports["mindir"]["knows"])
    terminal.read_to(PROMPT)
    terminal.type("1 " * 200 + "\n")
    assert re.search(r"expected 1 to 256, the longest of .*/reset forgets", terminal.read_to(PROMPT))
    terminal.type("/exit\n")
    assert terminal.wait() == 0
