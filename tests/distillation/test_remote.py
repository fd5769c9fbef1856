"""A teacher and a policy behind a server: oracles are an Annotator of this process on the same weights, replies in
vLLM's form worked out by hand, and what the command line does with the teacher in its own process."""

import json
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from mindpangu.config import RolloutConfig, RolloutServerConfig, load_recipe
from mindpangu.data.batches import tokenized_to_samples
from mindpangu.data.endpoint import Endpoint
from mindpangu.data.shards import ShardFolder, SharedShards, read_shard
from mindpangu.distillation.annotate import annotate
from mindpangu.distillation.cache import decode_topk
from mindpangu.distillation.remote import RemoteAnnotator, RemoteGenerator

VOCAB, ROW_LEN = 768, 128  # of the recipes at scale=smoke


@pytest.fixture(scope="module")
def teacher(smoke):
    return next(smoke[0].glob("runs/sft_teacher-smoke-*"))


@pytest.fixture(scope="module")
def teacher_url(teacher, serving):
    with serving(teacher, "--max-prompt-len", str(ROW_LEN), "--max-new-tokens", "16", "--max-logprobs", "12") as url:
        yield url


def connect(url, top_k, **options):
    endpoint = Endpoint(url, "mindpangu", max_retries=0, timeout_s=120, num_parallel=3)
    return RemoteAnnotator(endpoint, **{"top_k": top_k, "row_len": ROW_LEN, "vocab_size": VOCAB,
                                        "prompts_per_request": 4} | options)


def random_samples(seed, lengths):
    """The first sample has no target, the others have about half of their tokens."""
    random = np.random.default_rng(seed)
    return tokenized_to_samples([
        (random.integers(5, VOCAB, length), (np.arange(length) > 0) & (n > 0) & (random.random(length) < 0.5))
        for n, length in enumerate(lengths)])


def assert_same_top(ours, theirs, atol):
    """Log-probabilities equal to atol, and ids wherever the next log-probabilities are further away than that: a
    teacher of 6 steps is nearly flat."""
    (ids, logprobs), (other_ids, other_logprobs) = ours, theirs
    np.testing.assert_allclose(logprobs, other_logprobs, rtol=0, atol=atol)
    far = np.diff(-other_logprobs, axis=1) > 2 * atol
    apart = np.pad(far, ((0, 0), (1, 0)), constant_values=True) & np.pad(far, ((0, 0), (0, 1)))
    assert apart.mean() > 0.8, "few may be left out"
    np.testing.assert_array_equal(ids[apart], other_ids[apart])


# ---- By mindpangu.serve

def test_scores_by_a_server_are_those_of_an_annotator(teacher, teacher_url, cpu_library, mindspore_cpu, as_ranks,
                                                      tmp_path):
    from mindpangu.distillation.annotate import Annotator
    from mindpangu.model.weights import load_model
    from mindpangu.ops import kernels
    from mindpangu.runtime.checkpoint import newest_checkpoint

    parts = [random_samples(0, [9, 128, 2, 57, 31, 1, 128, 77, 3, 12, 64]), random_samples(1, [5, 2]),
             random_samples(2, [7]), tokenized_to_samples([])]
    kernels.select("native", [], "CPU", cpu_library.path)
    annotator = Annotator(load_model(newest_checkpoint(teacher)), top_k=10, row_len=ROW_LEN, num_rows=2, chunk_size=50)
    expected = [annotator.top_logprobs(part) for part in parts]
    kernels.select("reference", [], "CPU", cpu_library.path)
    remote = connect(teacher_url, 10)
    for part, theirs in zip(parts, expected, strict=True):
        ours = remote.top_logprobs(part)
        assert [array.dtype for array in ours] == [np.int32, np.float32, np.float32]
        assert [array.shape for array in ours] == [array.shape for array in theirs]
        if len(theirs[0]):
            assert_same_top(ours[:2], theirs[:2], atol=1e-5)
        np.testing.assert_allclose(ours[2], theirs[2], rtol=0, atol=1e-5)
    assert len(expected[0][0]) > 200 and not len(expected[2][0])

    # Two ranks share the shards.
    def fill(world):
        annotate(connect(teacher_url, 10), parts.__getitem__,
                 SharedShards(ShardFolder.open(tmp_path / "shards", {"teacher": "t"}, 4), world))

    ShardFolder.open(tmp_path / "shards", {"teacher": "t"}, 4)
    as_ranks(2, fill)
    shards = ShardFolder.open(tmp_path / "shards", {"teacher": "t"}, 4)
    assert shards.complete and [len(arrays["tokens"]) for arrays in shards.read_all()] == [len(p.tokens) for p in parts]


def test_more_than_the_server_gives_is_an_error_that_says_what_to_raise(teacher_url):
    with pytest.raises(OSError, match=r"kd.server: .*status 400: prompt_logprobs=13: expected an integer from 0 to 12 "
                                      r"\(--max-logprobs\).* --max-model-len 129, --max-logprobs 13"):
        connect(teacher_url, 13).top_logprobs(random_samples(0, [2, 40]))
    with pytest.raises(OSError, match="prompt 0 has 129 tokens: this server takes 1 to 128"):
        connect(teacher_url, 3, row_len=200).top_logprobs(random_samples(0, [2, 129]))
    with pytest.raises(ValueError, match="data.seq_len=128: 1 of 2 samples are longer, the longest sample has 129"):
        connect(teacher_url, 3).top_logprobs(random_samples(0, [2, 129]))


def run(folder, module, *overrides, code=0):
    done = subprocess.run([sys.executable, "-m", f"mindpangu.{module}", "scale=smoke", *overrides], cwd=folder,
                          capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


@pytest.mark.long
def test_a_run_by_a_server_that_was_lost_goes_on_by_another_and_gives_the_losses_of_the_teacher_in_process(
        smoke, teacher, teacher_url, serving, tmp_path):
    subprocess.run(["cp", "-a", smoke[0] / "runs", tmp_path], check=True)
    [builtin] = [path for path in tmp_path.glob("runs/annotations-*") if len(list(path.glob("*.shard"))) == 3]
    before = {path: path.read_bytes() for path in builtin.iterdir()}
    command = ["kd.engine=openai", "kd.server.max_retries=0"]
    with serving(teacher, "--max-prompt-len", str(ROW_LEN), "--max-new-tokens", "16") as url:
        process = subprocess.Popen(
            [sys.executable, "-m", "mindpangu.annotate", "scale=smoke", *command, f"kd.server.url={url}",
             "kd.server.prompts_per_request=1", "kd.server.num_parallel=1"],
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        known = {path.name for path in smoke[0].glob("runs/annotations-*")}
        while not (found := [path for path in tmp_path.glob("runs/annotations-*/00000.shard")
                             if path.parent.name not in known]):
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.005)
    output = process.communicate()[0]
    assert process.returncode == 1 and f"error: kd.server: {url}/completions" in output and "Traceback" not in output
    [first] = found
    assert not (first.parent / "00002.shard").exists()
    written = first.stat().st_mtime_ns

    output = run(tmp_path, "train", *command, f"kd.server.url={teacher_url}", "run.dir=served")
    assert "top 10 by a server, in " in output and "kd_student: done" in output
    assert first.stat().st_mtime_ns == written, "kept, not scored again"
    assert {path: path.read_bytes() for path in builtin.iterdir()} == before
    for name in ("00000.shard", "00001.shard", "00002.shard"):
        ours, theirs = read_shard(first.parent / name), read_shard(builtin / name)
        assert all((ours[array] == theirs[array]).all() for array in ("tokens", "offsets", "is_target"))
        ours, theirs = (decode_topk({key[5:]: array for key, array in arrays.items() if key.startswith("topk.")})
                        for arrays in (ours, theirs))
        # The codec's step near the top is 1/64 nat: a float32's last bit may decide which of two levels is stored.
        assert np.mean(np.abs(ours[1] - theirs[1]) < 1e-5) > 0.98
        np.testing.assert_allclose(ours[1], theirs[1], rtol=0, atol=0.05)
    ours, theirs = ([row for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
                     if "loss" in row] for folder in (tmp_path / "served", next(tmp_path.glob("runs/kd_student-*"))))
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] and ours
    for one, other in zip(ours, theirs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["kl"] == pytest.approx(other["kl"], rel=1e-3)


def test_the_engine_is_part_of_a_runs_key_and_the_servers_address_is_not(smoke, monkeypatch):
    from mindpangu.pipeline import Plan

    monkeypatch.chdir(smoke[0])

    def key(*overrides):
        overrides = ["scale=smoke", *overrides]
        return Plan(load_recipe(overrides), overrides).key

    one = key("kd.engine=openai", "kd.server.url=http://127.0.0.1:1/v1")
    assert one == key("kd.engine=openai", "kd.server.url=http://127.0.0.1:2/v1", "kd.server.num_parallel=2",
                      "kd.server.timeout_s=9")
    assert len({one, key(), key("kd.engine=mindformers")}) == 3


# ---- By replies in vLLM's form

class Replies(ThreadingHTTPServer):
    """Answers every POST with (status, reply), and keeps what was asked."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Replying)
        self.status, self.reply, self.bodies, self.paths = 200, {}, [], []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


class Replying(BaseHTTPRequestHandler):
    def do_POST(self):
        self.server.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.server.paths.append(self.path)
        content = json.dumps(self.server.reply).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def running_replies():
    with Replies() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def replies(running_replies):
    running_replies.status, running_replies.bodies, running_replies.paths = 200, [], []
    return running_replies


def entry(logprob, rank):
    return {"logprob": logprob, "rank": rank, "decoded_token": "x"}


def vllm_reply():
    """For the prompts [5, 7, 9] and [5, 6] at K = 2, as vLLM writes them: the prompt's own token first; at the places 1
    of both prompts it is not among the top 2; -inf is written as -9999.0. The choices come in another order."""
    return {"id": "cmpl-1", "object": "text_completion", "model": "mindpangu", "choices": [
        {"index": 1, "text": " a", "finish_reason": "length", "prompt_logprobs": [
            None, {"6": entry(-9999.0, 760), "3": entry(-0.5, 1), "4": entry(-1.0, 2)}]},
        {"index": 0, "text": " a", "finish_reason": "length", "prompt_logprobs": [
            None, {"7": entry(-4.0, 9), "700": entry(-0.25, 1), "2": entry(-2.0, 2)},
            {"9": entry(-1.5, 2), "8": entry(-0.5, 1)}]}]}


SAMPLES = tokenized_to_samples([([5, 7, 9], [False, True, True]), ([5, 6], [False, True])])


def test_vllms_replies_are_read_and_its_request_has_its_fields(replies):
    replies.reply = vllm_reply()
    ids, logprobs, label_logprobs = connect(replies.url, 2).top_logprobs(SAMPLES)
    assert ids.tolist() == [[700, 2], [8, 9], [3, 4]]
    assert logprobs.tolist() == [[-0.25, -2.0], [-0.5, -1.5], [-0.5, -1.0]]
    assert label_logprobs.tolist() == [-4.0, -1.5, -9999.0]
    assert replies.bodies == [{"model": "mindpangu", "prompt": [[5, 7, 9], [5, 6]], "max_tokens": 1, "temperature": 0,
                               "prompt_logprobs": 2}]


def damaged(change):
    reply = vllm_reply()
    change(reply, reply["choices"][1]["prompt_logprobs"])
    return reply


@pytest.mark.parametrize(("change", "words"), [
    (lambda reply, _: reply.clear(), "no list of choices with an index"),
    (lambda reply, _: reply.update(choices=[1, 2]), "no list of choices with an index"),
    (lambda reply, _: reply["choices"].pop(), "1 answers came, 2 were asked for"),
    (lambda reply, _: reply["choices"][1].pop("prompt_logprobs"), "no list choices[].prompt_logprobs: use a server"),
    (lambda reply, _: reply["choices"][1].update(prompt_logprobs=None), "no list choices[].prompt_logprobs"),
    (lambda _, positions: positions.pop(), "of 2 tokens came for a prompt of 3"),
    (lambda _, positions: positions.insert(0, None), "of 4 tokens came for a prompt of 3: the server has to take"),
    (lambda _, positions: positions.__setitem__(2, None), "None came for a token's log-probabilities: expected {token"),
    (lambda _, positions: positions[1].update({"the": entry(-3.0, 3)}), "expected {token id"),
    (lambda _, positions: positions[1].update({"700": -0.25}), "expected {token id"),
    (lambda _, positions: positions[1]["700"].pop("logprob"), "expected {token id"),
    (lambda _, positions: positions[1]["700"].update(logprob=None), "expected {token id"),
    (lambda _, positions: positions[1].update({"768": entry(-3.0, 3)}), "token 768 came, but the teacher's vocabulary "
     "has 768: serve the folder that teacher= names"),
    (lambda _, positions: positions[1].update({"-1": entry(-3.0, 3)}), "token -1 came"),
    (lambda _, positions: positions[1]["2"].update(logprob=float("nan")), "log-probability nan came"),
    (lambda _, positions: positions[1]["2"].update(logprob=3.5), "log-probability 3.5 came: expected at most 0"),
    (lambda _, positions: positions[1].pop("7"), "without that of the prompt's own token 7"),
    (lambda _, positions: positions[2].pop("8"), "1 log-probabilities came for a token, kd.top_k=2 were asked for: "
     "raise the server's limit (vllm serve: --max-logprobs 2)"),
])
def test_a_reply_that_is_not_what_was_asked_for_is_an_error(replies, change, words):
    replies.reply = damaged(change)
    with pytest.raises(ValueError) as error:
        connect(replies.url, 2).top_logprobs(SAMPLES)
    assert str(error.value).startswith("kd.server: ") and words in str(error.value), error.value


def test_vllms_refusals_come_with_the_options_that_it_needs(replies):
    replies.status = 400
    replies.reply = {"error": {"message": "Requested prompt logprobs of 50, which is greater than max allowed: 20",
                               "type": "BadRequestError", "param": "prompt_logprobs", "code": 400}}
    with pytest.raises(OSError) as error:
        connect(replies.url, 50).top_logprobs(SAMPLES)
    for words in ("kd.server: ", "max allowed: 20", "--max-logprobs 50", "--max-model-len 129"):
        assert words in str(error.value)


# ---- A policy's rollouts, by replies in vLLM's form

def policy(url, tmp_path, server=None, **rollout):
    """A RemoteGenerator whose weights are a file that says how often they were handed over."""
    versions = iter(range(1, 9))

    def save_model(folder):
        folder.mkdir(parents=True)
        (folder / f"weights-{next(versions)}").touch()

    config = RolloutConfig(samples_per_prompt=2, max_prompt_len=4, max_new_tokens=3, engine="openai",
                           server=RolloutServerConfig(url=url, model="policy", **server or {}), **rollout)
    endpoint = Endpoint(url, "policy", max_retries=0, timeout_s=60)
    return RemoteGenerator(endpoint, config, eos_id=2, save_model=save_model, folder=tmp_path / "served")


def vllm_choices():
    """Two answers to one prompt: one that ended, with token ids, and one cut off, which names its tokens only."""
    return {"choices": [
        {"index": 1, "finish_reason": "length", "logprobs": {
            "tokens": ["token_id:7", "token_id:8", "token_id:9"], "token_logprobs": [-0.5, -1.0, -2.0]}},
        {"index": 0, "finish_reason": "stop", "token_ids": [5, 2], "logprobs": {
            "tokens": ["token_id:5", "token_id:2"], "token_logprobs": [-0.25, -4.0]}}]}


KEYS = [(3, 0, 0), (3, 0, 1)]


def test_vllms_answers_are_token_ids_and_its_request_has_its_fields(replies, tmp_path):
    replies.reply = vllm_choices()
    ended, cut = policy(replies.url, tmp_path).generate([np.array([1, 6], np.int32)] * 2, KEYS)
    assert (ended.tokens.tolist(), ended.logprobs.tolist(), ended.truncated) == ([5, 2], [-0.25, -4.0], False)
    assert (cut.tokens.tolist(), cut.logprobs.tolist(), cut.truncated) == ([7, 8, 9], [-0.5, -1.0, -2.0], True)
    assert not ended.kept_logprobs.any() and not cut.kept_logprobs.any()
    [body] = replies.bodies
    assert 0 <= body.pop("seed") < 2**62 and replies.paths == ["/v1/completions"]
    assert body == {"model": "policy", "prompt": [[1, 6]], "n": 2, "max_tokens": 3, "temperature": 1.0, "top_p": 1.0,
                    "top_k": -1, "logprobs": 0, "return_token_ids": True, "return_tokens_as_token_ids": True,
                    "skip_special_tokens": False}


@pytest.mark.parametrize(("change", "rollout", "words"), [
    (lambda choices: choices[0]["logprobs"].update(tokens=["a", "b", "c"]), {}, "the reply has no token ids"),
    (lambda choices: choices[0].pop("logprobs"), {}, "the reply has no token ids"),
    (lambda choices: choices[1].pop("logprobs"), {}, "2 tokens came with 0 log-probabilities"),
    (lambda choices: choices[1].update(token_ids=[5, 6]), {}, "does not end in the turn end, token 2"),
    (lambda choices: choices.pop(), {}, "1 answers came, 2 were asked for"),
    (lambda choices: None, {"top_p": 0.9}, "does not say how much probability they keep"),
])
def test_a_reply_without_what_training_needs_is_an_error(replies, tmp_path, change, rollout, words):
    replies.reply = vllm_choices()
    change(replies.reply["choices"])
    with pytest.raises(ValueError) as error:
        policy(replies.url, tmp_path, **rollout).generate([np.array([1, 6], np.int32)] * 2, KEYS)
    assert str(error.value).startswith("rollout.") and words in str(error.value), error.value


def test_weights_are_handed_over_where_and_how_the_recipe_says_and_only_when_they_have_changed(replies, tmp_path):
    server = {"reload_url": replies.url.removesuffix("/v1") + "/collective_rpc",
              "reload_body": '{"method": "reload_weights", "kwargs": {"weights_path": "{folder}"}}'}
    generator = policy(replies.url, tmp_path, server)
    for digest, version in (("a", 1), ("a", 1), ("b", 2)):
        generator.load(digest)
        assert [path.name for path in (tmp_path / "served").iterdir()] == [f"weights-{version}"]
    body = {"method": "reload_weights", "kwargs": {"weights_path": str(tmp_path / "served")}}
    assert replies.bodies == [body] * 2 and replies.paths == ["/collective_rpc"] * 2
    replies.status, replies.reply = 500, {"error": "out of memory"}
    for _ in range(2):  # refused weights are not taken for loaded
        with pytest.raises(OSError, match="rollout.server: .*/collective_rpc answered 500 to .*out of memory"):
            generator.load("c")
