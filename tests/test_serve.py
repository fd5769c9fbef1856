"""The server as a process, over HTTP; oracle: a Generator of this process's own on the same weights."""

import contextlib
import http.client
import json
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import requests
from safetensors.numpy import load_file, save_file

from mindpangu import serve
from mindpangu.data.chat import decode_response, encode_prompt
from mindpangu.data.documents import Message
from mindpangu.data.endpoint import Endpoint
from mindpangu.data.tokenizer import Tokenizer

PROMPT_LEN, MAX_NEW = 48, 32
SAMPLING = {"temperature": 0.8, "top_k": 20, "top_p": 0.9}
LIMITS = ("--max-prompt-len", PROMPT_LEN, "--max-new-tokens", MAX_NEW)
ATOL = 1e-5  # the same kernels on the same shapes; another build of MindSpore may sum in another order


class Server:
    def __init__(self, url, process):
        self.root, self.process = url.removesuffix("/v1"), process

    def post(self, path, /, **body):
        """The reply to a request that has to succeed."""
        answer = requests.post(self.root + path, json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def complete(self, prompt, **body):
        """Choices with token ids and log-probabilities."""
        body = {"logprobs": 0, "return_token_ids": True, "max_tokens": MAX_NEW} | body
        return self.post("/v1/completions", prompt=prompt, **body)["choices"]

    def error(self, path, /, **body):
        """(status, error) of a request that has to fail."""
        answer = requests.post(self.root + path, json=body, timeout=120)
        assert answer.status_code >= 400 and answer.json().keys() == {"error"}
        assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
        return answer.status_code, answer.json()["error"]


@contextlib.contextmanager
def running(folder, *options):
    """A Server on the weights in a folder; at the end, nothing it wrote may be a traceback."""
    command = [sys.executable, "-m", "mindpangu.serve", folder, "--port", 0, *options]
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True) as process:
        lines, readers = [], []
        try:
            for line in process.stdout:
                lines.append(line)
                if url := re.search(r"serving .* at (http://\S+/v1)", line):
                    break
            else:
                raise AssertionError("".join(lines))
            readers.append(threading.Thread(target=lambda: lines.extend(process.stdout)))
            readers[0].start()
            yield Server(url[1], process)
        finally:
            process.kill()
            for reader in readers:
                reader.join()
    assert "Traceback" not in "".join(lines)


@pytest.fixture(scope="module")
def folders(smoke):
    """{recipe: the folder of its run's last checkpoint}."""
    return {name: next(smoke[0].glob(f"runs/{name}-smoke-*/checkpoints/step-000006"))
            for name in ("kd_student", "sft_fast", "sft_reasoning", "sft_teacher")}


@pytest.fixture(scope="module")
def process(folders):
    with running(folders["kd_student"].parents[1], *LIMITS) as server:
        yield server


@pytest.fixture
def server(process, folders):
    """With the weights of kd_student, whatever a test before loaded."""
    if requests.get(process.root + "/v1/models", timeout=10).json()["data"][0]["root"] != str(folders["kd_student"]):
        process.post("/reload", path=str(folders["kd_student"]))
    return process


@pytest.fixture(scope="module")
def tokenizer(folders):
    return Tokenizer(folders["kd_student"] / "tokenizer.model")


@pytest.fixture
def generate(cpu_library, mindspore_cpu, folders, tokenizer):
    """(recipe, prompts, keys, sampling) -> Answers by the native kernels in this process."""
    from mindpangu.model.generate import Generator
    from mindpangu.model.weights import load_model
    from mindpangu.ops import kernels

    kernels.select("native", [], "CPU", cpu_library.path)

    def build(name, prompts, keys, sampling):
        generator = Generator(load_model(folders[name]), num_slots=8, prompt_len=PROMPT_LEN, max_new_tokens=MAX_NEW,
                              eos_id=tokenizer.turn_end_id, pad_id=tokenizer.pad_id, **sampling)
        return generator.generate([np.array(prompt, np.int32) for prompt in prompts], keys)

    yield build
    kernels.select("reference", [], "CPU", cpu_library.path)


def assert_same(choice, answer):
    assert choice["token_ids"] == answer.tokens.tolist()
    assert choice["finish_reason"] == ("length" if answer.truncated else "stop")
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == [f"token_id:{token}" for token in answer.tokens]
    np.testing.assert_allclose(logprobs["token_logprobs"], answer.logprobs, atol=ATOL, rtol=0)
    np.testing.assert_allclose(logprobs["kept_logprobs"], answer.kept_logprobs, atol=ATOL, rtol=0)


def ragged_prompts(count, seed=0):
    """Prompts of 1 to PROMPT_LEN ordinary tokens, both lengths among them."""
    random = np.random.default_rng(seed)
    lengths = [1, PROMPT_LEN, *random.integers(1, PROMPT_LEN + 1, count)][:count]
    return [random.integers(10, 768, length).tolist() for length in lengths]


# ---- Completions

def test_completions_of_token_ids_are_the_generators_answers_for_the_same_seed(server, generate):
    prompts = ragged_prompts(7)
    keys = [(11, prompt, sample) for prompt in range(7) for sample in range(3)]
    choices = server.complete(prompts, n=3, seed=11, **SAMPLING)
    answers = generate("kd_student", [prompts[prompt] for _, prompt, _ in keys], keys, SAMPLING)
    assert len({answer.truncated for answer in answers}) == 2, "the case has to have answers of both kinds"
    assert min(answer.kept_logprobs.min() for answer in answers) < -0.1, "and top-k, top-p something to drop"
    for i, (choice, answer, (_, prompt, _)) in enumerate(zip(choices, answers, keys, strict=True)):
        assert choice["index"] == i and choice["prompt_token_ids"] == prompts[prompt]
        assert_same(choice, answer)


def test_temperature_zero_is_greedy(server, generate):
    prompts = ragged_prompts(4, seed=1)
    choices = server.complete(prompts, temperature=0, n=2)
    answers = generate("kd_student", prompts, None, {"temperature": 0.0})
    for i, answer in enumerate(answers):
        for choice in choices[2 * i:2 * i + 2]:
            assert_same(choice, answer)


def test_fewer_tokens_are_the_beginning_of_more(server):
    prompts, body = ragged_prompts(6, seed=2), {"seed": 3, "n": 16, "temperature": 1.5}
    whole = server.complete(prompts, **body)
    for max_tokens in (1, 5, 16, 17):
        for choice, longer in zip(server.complete(prompts, max_tokens=max_tokens, **body), whole, strict=True):
            assert choice["token_ids"] == longer["token_ids"][:max_tokens]
            assert (choice["finish_reason"] == "stop") == (choice["token_ids"][-1] == 4)
            np.testing.assert_allclose(choice["logprobs"]["token_logprobs"],
                                       longer["logprobs"]["token_logprobs"][:max_tokens], atol=ATOL, rtol=0)
    lengths = {len(choice["token_ids"]) for choice in whole if choice["finish_reason"] == "stop"}
    assert any(5 < length <= 16 for length in lengths) and any(length > 17 for length in lengths)
    # Without max_tokens there are 16, as with other servers.
    assert [len(choice["token_ids"]) for choice in server.complete(prompts, max_tokens=None, **body)] == [
        min(16, len(choice["token_ids"])) for choice in whole]


def test_a_text_is_encoded_and_its_continuation_comes_back_as_text(server, tokenizer):
    text = "Amy has 3 apples, 小明有4个。 She"
    reply = server.post("/v1/completions", prompt=[text, "é"], n=8, temperature=0.6, seed=2, return_token_ids=True)
    prompt_tokens = [1, *tokenizer.encode(text)]
    for choice in reply["choices"][:8]:
        assert choice["prompt_token_ids"] == prompt_tokens and choice["logprobs"] is None
        tokens = [token for token in choice["token_ids"] if token != tokenizer.turn_end_id]
        whole = tokenizer.decode([*prompt_tokens, *tokens])
        assert whole.startswith("<s>" + text) and "<s>" + text + choice["text"] == whole
    usage = reply["usage"]
    assert usage["prompt_tokens"] == len(prompt_tokens) + 1 + len(tokenizer.encode("é"))
    assert usage["completion_tokens"] == sum(len(choice["token_ids"]) for choice in reply["choices"])
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_a_seed_decides_and_none_differs_from_request_to_request(server):
    prompt = ragged_prompts(3, seed=4)[2]

    def tokens(**body):
        return [choice["token_ids"] for choice in server.complete(prompt, n=4, **body)]

    assert tokens(seed=5) == tokens(seed=5) != tokens(seed=6)
    assert len({json.dumps(tokens()) for _ in range(3)}) == 3
    assert len({json.dumps(answer) for answer in tokens(seed=5)}) == 4


def test_fields_that_ask_for_what_is_done_anyway_are_taken(server, tokenizer):
    plain = server.complete([5, 6], seed=1)
    assert plain == server.complete([5, 6], seed=1, model="mindpangu", stream=False, stop=None, echo=False, top_k=-1,
                                    presence_penalty=0, frequency_penalty=0.0, logit_bias={}, min_p=0, user="me",
                                    stop_token_ids=[tokenizer.turn_end_id], skip_special_tokens=False,
                                    return_tokens_as_token_ids=True, repetition_penalty=1.0, temperature=1)


def test_the_projects_client_gets_along_with_it(server):
    endpoint = Endpoint(server.root + "/v1", "mindpangu", timeout_s=60)
    prompts = [[7, token] for token in range(10, 20)]
    answers = endpoint.map([{"prompt": prompt, "temperature": 0, "return_token_ids": True} for prompt in prompts])
    assert [answer["choices"][0]["prompt_token_ids"] for answer in answers] == prompts
    assert endpoint.chat([{"role": "user", "content": "3 + 4?"}], temperature=0) == server.post(
        "/v1/chat/completions", messages=[{"role": "user", "content": "3 + 4?"}], temperature=0,
        )["choices"][0]["message"]["content"]


def test_a_prompts_logprobs_are_in_vllms_form(server):
    """The numbers are checked by tests/distillation/test_remote.py."""
    prompts = ragged_prompts(4, seed=9)
    choices = server.complete(prompts, max_tokens=1, n=2, prompt_logprobs=5)
    assert [choice["prompt_logprobs"] for choice in choices[::2]] == [
        choice["prompt_logprobs"] for choice in choices[1::2]]
    outside = 0
    for prompt, choice in zip(prompts, choices[::2], strict=True):
        first, *rest = choice["prompt_logprobs"]
        assert first is None and len(rest) == len(prompt) - 1
        for token, entries in zip(prompt[1:], rest, strict=True):
            assert all(entry.keys() == {"logprob", "rank", "decoded_token"} for entry in entries.values())
            ranked = sorted((entry["rank"] or 21, entry["logprob"]) for entry in entries.values())
            assert [rank for rank, _ in ranked[:5]] == [1, 2, 3, 4, 5] and len(ranked) <= 6
            assert [logprob for _, logprob in ranked] == sorted((logprob for _, logprob in ranked), reverse=True)
            assert str(token) in entries and sum(np.exp(logprob) for _, logprob in ranked) < 1
            outside += len(ranked) == 6
    assert outside, "some tokens are not among the most likely"
    [choice] = server.complete([5, 6, 7], prompt_logprobs=0)
    assert [list(entries) for entries in choice["prompt_logprobs"][1:]] == [["6"], ["7"]]


# ---- Chats

def test_a_chat_is_the_template_around_a_completion(server, generate, tokenizer):
    conversation = [Message("system", "Be brief."), Message("user", "3 + 4?"), Message("assistant", "7", "3 and 4"),
                    Message("user", "小明？")]
    prompt = encode_prompt(tokenizer, conversation)
    messages = [{"role": role, "content": content, **({"reasoning_content": thoughts} if thoughts else {})}
                for role, content, thoughts in conversation]
    choices = server.post("/v1/chat/completions", messages=messages, n=5, seed=3, max_completion_tokens=20,
                          logprobs=True, return_token_ids=True, **SAMPLING)["choices"]
    answers = generate("kd_student", [prompt] * 5, [(3, 0, sample) for sample in range(5)], SAMPLING)
    for choice, answer in zip(choices, answers, strict=True):
        tokens = answer.tokens[:20]
        assert choice["token_ids"] == tokens.tolist() and choice["prompt_token_ids"] == prompt.tolist()
        assert choice["message"] == {"role": "assistant", "content": decode_response(tokenizer, tokens).content}
        entries = choice["logprobs"]["content"]
        assert [entry["token"] for entry in entries] == [f"token_id:{token}" for token in tokens]
        np.testing.assert_allclose([entry["logprob"] for entry in entries], answer.logprobs[:20], atol=ATOL, rtol=0)


def test_thoughts_are_apart_from_the_content(folders, tokenizer):
    # After six steps the reasoning model opens about 1 in 80 answers with thoughts.
    with running(folders["sft_reasoning"], "--num-slots", 64, "--max-prompt-len", 24, "--max-new-tokens", 16) as server:
        choices = server.post("/v1/chat/completions", messages=[{"role": "user", "content": "3+4=?"}], n=1024, seed=1,
                              max_tokens=6, return_token_ids=True)["choices"]
    thinking = [choice for choice in choices if choice["token_ids"][0] == tokenizer.think_open_id]
    assert len(thinking) >= 2
    for choice in choices:
        said = decode_response(tokenizer, choice["token_ids"])
        expected = {"role": "assistant", "content": said.content}
        assert choice["message"] == expected | ({"reasoning_content": said.thoughts} if choice in thinking else {})


# ---- Reload

def test_reload_switches_to_the_weights_of_a_folder_and_back(server, generate, folders):
    prompts = ragged_prompts(5, seed=6)
    keys = [(2, prompt, 0) for prompt in range(5)]
    seen = []
    for name in ("kd_student", "sft_fast", "sft_reasoning", "kd_student"):
        assert server.post("/reload", path=str(folders[name])) == {"status": "ok", "path": str(folders[name])}
        [model] = requests.get(server.root + "/v1/models", timeout=10).json()["data"]
        assert model["id"] == "mindpangu" and model["root"] == str(folders[name])
        assert model["max_model_len"] == PROMPT_LEN + MAX_NEW
        choices = server.complete(prompts, seed=2)
        for choice, answer in zip(choices, generate(name, prompts, keys, {}), strict=True):
            assert_same(choice, answer)
        seen.append([choice["token_ids"] for choice in choices])
    assert seen[0] == seen[3] and seen[0] != seen[1] != seen[2]


def test_bfloat16_weights_are_replaced_too(folders):
    prompts = ragged_prompts(4, seed=7)

    def answers(server):
        return server.complete(prompts, max_tokens=16, temperature=0)

    with running(folders["sft_fast"], *LIMITS, "--precision", "bfloat16") as server:
        expected = answers(server)
    with running(folders["kd_student"], *LIMITS, "--precision", "bfloat16") as server:
        before = answers(server)
        server.post("/reload", path=str(folders["sft_fast"]))
        assert answers(server) == expected != before


def test_a_folder_that_cannot_be_loaded_leaves_the_weights_in_use(server, folders, tmp_path):
    before = server.complete([5, 6, 7], temperature=0)
    shutil.copytree(folders["sft_fast"], tmp_path / "bad")
    weights = tmp_path / "bad" / "model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}, weights)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer.model").write_bytes(b"no tokenizer")
    for path, part in [(tmp_path / "bad", "model.norm.weight is missing"), (tmp_path / "none", "is not a folder"),
                       (folders["sft_teacher"], "model.num_layers=2, but config.json says 3"),
                       (tmp_path / "other", "not a SentencePiece model")]:
        status, error = server.error("/reload", path=str(path))
        assert status == 400 and error["param"] == "path" and part in error["message"]
    assert server.complete([5, 6, 7], temperature=0) == before


def test_weights_that_give_no_numbers_are_an_error_of_the_server_which_goes_on(server, folders, tmp_path):
    shutil.copytree(folders["sft_fast"], tmp_path / "nan")
    tensors = load_file(tmp_path / "nan" / "model.safetensors")
    tensors["model.norm.weight"][:] = np.nan
    save_file(tensors, tmp_path / "nan" / "model.safetensors")
    server.post("/reload", path=str(tmp_path / "nan"))
    status, error = server.error("/v1/completions", prompt=[5, 6], logprobs=0)
    assert status == 500 and error["type"] == "server_error" and "not finite: check its weights" in error["message"]
    server.post("/reload", path=str(folders["kd_student"]))
    assert server.complete([5, 6])


# ---- Requests at the same time

def test_requests_at_the_same_time_get_what_they_get_alone(server, folders):
    prompts = ragged_prompts(12, seed=8)

    def ask(i):
        return server.complete(prompts[i], n=3, seed=i, temperature=1 if i % 2 else 0.5)

    alone = [ask(i) for i in range(12)]
    with ThreadPoolExecutor(16) as threads:
        asked = [threads.submit(ask, i) for i in range(12)]
        reloaded = [threads.submit(server.post, "/reload", path=str(folders["kd_student"])) for _ in range(3)]
        together = [future.result() for future in asked]
        assert all(future.result()["status"] == "ok" for future in reloaded)
    for one, other in zip(alone, together, strict=True):
        assert [choice["token_ids"] for choice in one] == [choice["token_ids"] for choice in other]


def test_health_and_errors_do_not_wait_for_a_generation(server):
    with ThreadPoolExecutor(1) as threads:
        long = threads.submit(server.complete, [5, 6], n=200)
        time.sleep(0.3)
        assert requests.get(server.root + "/health", timeout=10).json() == {"status": "ok"}
        assert server.error("/v1/completions", prompt=[])[0] == 400
        assert not long.done()
        assert len(long.result()) == 200


def test_a_client_that_leaves_does_not_disturb_the_others(server):
    address = server.root.removeprefix("http://").split(":")
    for sent in (b"", b"POST /v1/comp", b"POST /v1/completions HTTP/1.1\r\nContent-Length: 500\r\n\r\n{",
                 b'POST /v1/completions HTTP/1.1\r\nContent-Length: 27\r\n\r\n{"prompt": [5, 6], "n": 40 }'):
        with socket.create_connection((address[0], int(address[1]))) as connection:
            connection.sendall(sent)
    assert server.complete([5, 6])


def test_clients_that_stop_in_the_middle_or_reset_the_connection_are_hung_up_on_in_silence(monkeypatch, capfd):
    monkeypatch.setattr(serve._Handler, "timeout", 0.2)
    with serve._Server(("127.0.0.1", 0)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with socket.create_connection(server.server_address, timeout=20) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Length: 500\r\n\r\n{")
            assert connection.recv(1000) == b""
        for sent in (b"", b"POST /v1/comp", b"POST /v1/completions HTTP/1.1\r\nContent-Length: 500\r\n\r\n{"):
            with socket.create_connection(server.server_address) as connection:
                connection.sendall(sent)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            time.sleep(0.1)
        server.shutdown()
    assert capfd.readouterr().err == ""


# ---- Errors

@pytest.mark.parametrize(("body", "param", "part"), [
    ({}, "prompt", "prompt=null: expected a text, token ids from 0 to 767"),
    ({"prompt": []}, "prompt", "prompt=[]"), ({"prompt": [[]]}, "prompt", "prompt=[[]]"),
    ({"prompt": 5}, "prompt", "prompt=5"), ({"prompt": ["a", [5]]}, "prompt", "expected a text"),
    ({"prompt": [5, "a"]}, "prompt", "expected a text"), ({"prompt": [768]}, "prompt", "0 to 767"),
    ({"prompt": [-1]}, "prompt", "0 to 767"), ({"prompt": [1.0]}, "prompt", "0 to 767"),
    ({"prompt": [True]}, "prompt", "0 to 767"), ({"prompt": "\ud83d"}, "prompt", "half of a surrogate pair"),
    ({"prompt": [5] * 49}, "prompt", "prompt 0 has 49 tokens: this server takes 1 to 48 (--max-prompt-len)"),
    ({"prompt": [[5], [5] * 60]}, "prompt", "prompt 1 has 60 tokens"),
    ({"prompt": "word " * 100}, "prompt", "tokens: this server takes 1 to 48"),
    ({"max_tokens": 33}, "max_tokens", "max_tokens=33: this server gives at most 32 (--max-new-tokens)"),
    ({"max_tokens": 0}, "max_tokens", "expected an integer from 1"), ({"max_tokens": "5"}, "max_tokens", '"5"'),
    ({"max_tokens": 1.5}, "max_tokens", "1.5"), ({"n": 0}, "n", "n=0: expected an integer from 1 to 1024"),
    ({"n": True}, "n", "n=true"), ({"temperature": -1}, "temperature", "temperature=-1: expected 0, or a number from"),
    ({"temperature": 1e-9}, "temperature", "from 0.01 to 100"), ({"temperature": "hot"}, "temperature", '"hot"'),
    ({"temperature": float("nan")}, "temperature", "NaN"), ({"top_p": 0}, "top_p", "above 0, and at most 1"),
    ({"top_p": 1.5}, "top_p", "above 0, and at most 1"), ({"top_k": -2}, "top_k", "from -1 to 768"),
    ({"top_k": 1.0}, "top_k", "from -1 to 768"), ({"seed": -1}, "seed", "seed=-1: expected an integer from 0"),
    ({"seed": 2**63}, "seed", "from 0"), ({"logprobs": 5}, "logprobs", "logprobs=5: expected 0 or 1"),
    ({"logprobs": True}, "logprobs", "expected 0 or 1"), ({"return_token_ids": 1}, "return_token_ids", "true or false"),
    ({"stream": True}, "stream", "stream=true is not supported: expected false"),
    ({"stop": ["\n"]}, "stop", 'stop=["\\n"] is not supported'), ({"stop": "x"}, "stop", "not supported"),
    ({"stop_token_ids": [5]}, "stop_token_ids", "expected [] or [4]"), ({"echo": True}, "echo", "not supported"),
    ({"best_of": 3}, "best_of", "best_of is unknown"), ({"temprature": 1}, "temprature", "temprature is unknown"),
    ({"prompt_logprobs": 21}, "prompt_logprobs", "expected an integer from 0 to 20 (--max-logprobs)"),
    ({"prompt_logprobs": True}, "prompt_logprobs", "prompt_logprobs=true: expected an integer"),
    ({"messages": []}, "messages", "messages is unknown"), ({"min_p": 0.1}, "min_p", "min_p=0.1 is not supported"),
    ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
    ({"n": "\ud83d"}, "n", r'n="\ud83d": expected'), ({"\ud83d": 1}, "\ud83d", r"\ud83d is unknown"),
])
def test_a_bad_completion_names_its_field(server, body, param, part):
    sent = json.dumps(({"prompt": [5, 6]} if param != "prompt" else {}) | body)  # allows NaN, unlike requests
    answer = requests.post(server.root + "/v1/completions", data=sent, timeout=60)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["type"] == "invalid_request_error" and error["param"] == param
    assert part in error["message"], error["message"]


@pytest.mark.parametrize(("body", "param", "part"), [
    ({}, "messages", "messages=null"), ({"messages": []}, "messages", "messages=[]"),
    ({"messages": ["hi"]}, "messages[0]", 'messages[0]="hi": expected'),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "messages[0].content=null: expected a text"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "expected a text"),
    ({"messages": [{"role": "user", "content": "\ud83d"}]}, "messages[0].content", "half of a surrogate pair"),
    ({"messages": [{"role": "developer", "content": "x"}]}, "messages", "messages[0].role='developer' is unknown"),
    ({"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]}, "messages", "at the start"),
    ({"messages": [{"role": "user", "content": "x", "reasoning_content": "y"}]}, "messages", "'assistant' only"),
    ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}]}, "messages[0].tool_calls",
     "messages[0].tool_calls is not supported"),
    ({"messages": [{"role": "user", "content": "x" * 200}]}, "prompt", "tokens: this server takes 1 to 48"),
    ({"stream": True}, "stream", "not supported"), ({"tools": [{"type": "function"}]}, "tools", "not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
    ({"logprobs": 1}, "logprobs", "true or false"), ({"top_logprobs": 3}, "top_logprobs", "not supported"),
    ({"max_completion_tokens": 99}, "max_tokens", "at most 32"), ({"prompt": "x"}, "prompt", "prompt is unknown"),
])
def test_a_bad_chat_names_its_field(server, body, param, part):
    sent = json.dumps({"messages": [{"role": "user", "content": "hi"}]} | body if "messages" in body or body else body)
    answer = requests.post(server.root + "/v1/chat/completions", data=sent, timeout=60)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param
    assert part in error["message"], error["message"]


def test_an_unknown_model_or_path_is_a_404(server):
    status, error = server.error("/v1/completions", prompt=[5], model="gpt-4")
    assert (status, error["param"], error["code"]) == (404, "model", "model_not_found")
    assert 'model="gpt-4" does not exist: expected mindpangu' in error["message"]
    assert server.error("/v1/embeddings", input="x")[0] == 404
    answer = requests.get(server.root + "/v1/nothing", timeout=10)
    assert answer.status_code == 404 and "/v1/models" in answer.json()["error"]["message"]
    for body, param in (({"folder": "x"}, "folder"), ({}, "path"), ({"path": 5}, "path")):
        status, error = server.error("/reload", **body)
        assert status == 400 and error["param"] == param


@pytest.mark.parametrize(("head", "content", "status", "part"), [
    ("POST /v1/completions HTTP/1.1\r\nContent-Length: 3\r\n", b"{x}", 400, "not JSON"),
    ("POST /v1/completions HTTP/1.1\r\nContent-Length: 2\r\n", b"[]", 400, "no JSON object"),
    ("POST /v1/completions HTTP/1.1\r\nContent-Length: 2\r\n", b"\xff\xfe", 400, "not JSON"),
    ("POST /v1/completions HTTP/1.1\r\nContent-Length: 100000\r\n", b"[" * 100_000, 400, "not JSON"),
    ("POST /v1/completions HTTP/1.1\r\n", b"", 411, "Content-Length"),
    ("POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\n", 411, "Content-Length"),
    ("POST /v1/completions HTTP/1.1\r\nContent-Length: -5\r\n", b"", 411, "Content-Length=-5"),
    ("POST /v1/completions HTTP/1.1\r\nContent-Length: 999999999\r\n", b"", 413, "at most 64 MiB"),
    ("PUT /v1/completions HTTP/1.1\r\n", b"", 501, "PUT"),
])
def test_malformed_http_is_answered_in_the_same_form(server, head, content, status, part):
    host, port = server.root.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(f"{head}Host: x\r\n\r\n".encode() + content)
        reply = http.client.HTTPResponse(connection)
        reply.begin()
        error = json.loads(reply.read())["error"]
    assert reply.status == status and part in error["message"]
    # Where a body was not read, its bytes would be taken for a next request.
    assert (reply.getheader("Connection") == "close") == (status != 400)


# ---- Start and end

@pytest.fixture(scope="module")
def start_error():
    """What a start that has to fail prints."""
    def start(*options):
        done = subprocess.run([sys.executable, "-m", "mindpangu.serve", *map(str, options)], capture_output=True,
                              text=True, timeout=60)
        assert done.returncode == 1 and "Traceback" not in done.stderr and done.stderr.startswith("error: ")
        return done.stderr
    return start


def test_a_start_that_cannot_work_says_why(start_error, folders, tmp_path):
    run = folders["kd_student"]
    assert "expected a run folder with a checkpoint" in start_error(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        message = start_error(run, "--port", taken.getsockname()[1])
    assert "cannot listen there (Address already in use); choose another --port" in message
    assert "--port 99999: expected 0 to 65535" in start_error(run, "--port", 99999)
    assert "expected at most 1024 together" in start_error(run, "--port", 0, "--max-prompt-len", 1000,
                                                           "--max-new-tokens", 25)
    assert "--num-slots 0" in start_error(run, "--port", 0, "--num-slots", 0)
    assert "run.precision" in start_error(run, "--port", 0, "--precision", "float8")


def test_an_interrupt_ends_it_at_once(folders):
    with running(folders["kd_student"], *LIMITS) as server:
        assert server.complete([5, 6])
        time.sleep(0.5)  # the reply is sent a moment before the server waits for the next request
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(timeout=2) == -signal.SIGINT


def test_memory_stays_bounded_over_many_sampling_settings(folders):
    with running(folders["kd_student"], "--max-prompt-len", 1000, "--max-new-tokens", 16, "--num-slots", 64) as server:
        def resident_mib():
            status = open(f"/proc/{server.process.pid}/status", encoding="utf-8").read()
            return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024

        sizes = []
        for i in range(9):  # 32 MiB of keys and values each, of which four may be kept
            server.complete([5, 6], max_tokens=16, temperature=1 + i / 100)
            sizes.append(resident_mib())
        assert sizes[8] < sizes[4] + 2 * 32, sizes
