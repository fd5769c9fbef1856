"""Oracle: what a server of the tests' own received and sent, over real HTTP."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from mindpangu.data.endpoint import Endpoint, EndpointError

MESSAGES = [{"role": "user", "content": "<answer 0123456789abcdef>\nexcel\n</answer 0123456789abcdef>"}]
SAID = '{"score": 6}'


@pytest.fixture
def connect(judge_server):
    def build(**options):
        return Endpoint(judge_server.url, "m", **{"timeout_s": 5, "backoff_s": 0.01} | options)
    return build


def test_a_chat_sends_the_model_its_messages_and_options_and_returns_what_it_says(judge_server, connect):
    assert connect().chat(MESSAGES, temperature=0, max_tokens=7) == SAID
    [request] = judge_server.log()
    assert request["path"] == "/v1/chat/completions"
    assert request["body"] == {"model": "m", "messages": MESSAGES, "temperature": 0, "max_tokens": 7}
    assert "Authorization" not in request["headers"]


def test_completions_name_the_model_and_return_the_servers_object(judge_server, connect):
    answer = connect().completions({"prompt": [1, 2, 3], "seed": 5})
    assert answer["choices"][0]["text"] == [3, 2, 1]
    assert judge_server.log()[0]["body"] == {"model": "m", "prompt": [1, 2, 3], "seed": 5}


@pytest.mark.parametrize("fault", [
    {"kind": "status", "status": 500}, {"kind": "status", "status": 503}, {"kind": "status", "status": 429},
    {"kind": "status", "status": 408}, {"kind": "malformed"}, {"kind": "malformed", "content": "[1]"},
    {"kind": "malformed", "content": ""}, {"kind": "close", "bytes": 0}, {"kind": "close", "bytes": 10},
    {"kind": "close", "bytes": 40}, {"kind": "hang", "seconds": 4}, {"kind": "trickle", "seconds": 4},
], ids=lambda fault: "-".join(str(value) for value in fault.values()))
def test_a_request_that_fails_twice_is_answered_at_the_third_attempt(judge_server, connect, fault):
    judge_server.set(faults=[fault | {"times": 2}])
    assert connect(timeout_s=1).chat(MESSAGES) == SAID
    assert len(judge_server.log()) == 3


def test_attempts_end_at_max_retries_with_the_url_the_reason_and_what_to_do(judge_server, connect):
    judge_server.set(faults=[{"kind": "status", "status": 502, "times": 99, "message": "no GPU today"}])
    with pytest.raises(EndpointError) as caught:
        connect(max_retries=2).chat(MESSAGES)
    assert len(judge_server.log()) == 3 and not caught.value.refused
    for part in (f"{judge_server.url}/chat/completions", "status 502: no GPU today", "3 attempts",
                 "raise timeout_s or"):
        assert part in str(caught.value)


def test_nobody_at_the_url_is_an_error_after_the_retries():
    started = time.monotonic()
    with pytest.raises(EndpointError, match=r"http://127.0.0.1:9/v1/completions: .*refused.*given up after 2 attempts"):
        Endpoint("http://127.0.0.1:9/v1", "m", max_retries=1, backoff_s=0.01).completions({"prompt": "x"})
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("kind", ["hang", "trickle"])
def test_a_server_that_hangs_or_trickles_holds_nobody_up_for_longer_than_the_timeout(judge_server, connect, kind):
    judge_server.set(faults=[{"kind": kind, "seconds": 9, "times": 9}])
    started = time.monotonic()
    with pytest.raises(EndpointError, match="no answer within timeout_s=0.4; given up after 2 attempts"):
        connect(timeout_s=0.4, max_retries=1).chat(MESSAGES)
    assert 0.8 <= time.monotonic() - started < 5


def test_pauses_between_attempts_double(judge_server, connect):
    judge_server.set(faults=[{"kind": "status", "status": 500, "times": 4}])
    connect(backoff_s=0.1).chat(MESSAGES)
    times = [request["time"] for request in judge_server.log()]
    pauses = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
    # Between half and all of 0.1, 0.2, 0.4, 0.8 s, and what the machine takes.
    for pause, longest in zip(pauses, (0.1, 0.2, 0.4, 0.8), strict=True):
        assert longest / 2 <= pause <= longest + 1


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_a_server_that_says_when_to_retry_is_obeyed(judge_server, connect, form):
    # A date has whole seconds, so that 2 s from now are 1 to 2 s.
    text = "1" if form == "seconds" else time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 2))
    judge_server.set(faults=[{"kind": "status", "status": 429, "headers": {"Retry-After": text}}])
    connect().chat(MESSAGES)
    first, second = (request["time"] for request in judge_server.log())
    assert 0.9 <= second - first <= 5


def test_a_server_that_asks_for_an_hour_is_given_up_at_once(judge_server, connect):
    judge_server.set(faults=[{"kind": "status", "status": 429, "headers": {"Retry-After": "3600"}}])
    with pytest.raises(EndpointError, match="asks to wait 3600 s.*given up after 1 attempts"):
        connect().chat(MESSAGES)


@pytest.mark.parametrize(("status", "advice"), [(400, "was refused"), (401, "check the key"), (404, "ends in /v1"),
                                                (422, "was refused")])
def test_a_refused_request_is_an_error_at_once_that_shows_what_the_server_says(judge_server, connect, status, advice):
    judge_server.set(faults=[{"kind": "status", "status": status, "message": "max_tokens is too large: 99999"}])
    with pytest.raises(EndpointError) as caught:
        connect().chat(MESSAGES)
    assert len(judge_server.log()) == 1 and caught.value.refused
    assert f"status {status}: max_tokens is too large: 99999" in str(caught.value) and advice in str(caught.value)


def test_a_redirect_is_an_error_and_not_followed_with_the_key(judge_server, connect, monkeypatch):
    monkeypatch.setenv("THE_KEY", "sk-123")
    judge_server.set(faults=[{"kind": "status", "status": 307, "headers": {"Location": "/v1/elsewhere"}}])
    with pytest.raises(EndpointError, match="status 307.*url that the server itself has"):
        connect(api_key_env="THE_KEY").chat(MESSAGES)
    assert [request["path"] for request in judge_server.log()] == ["/v1/chat/completions"]


@pytest.mark.parametrize("content", ['{"error": "x"}', '{"choices": []}', '{"choices": [{"message": null}]}',
                                     '{"choices": [{"message": {"content": [1]}}]}'])
def test_an_answer_of_another_form_is_named(judge_server, connect, content):
    judge_server.set(faults=[{"kind": "malformed", "content": content}])
    with pytest.raises(EndpointError, match="has no choices.*OpenAI-compatible"):
        connect().chat(MESSAGES)


def test_a_model_that_only_thinks_says_nothing(judge_server, connect):
    judge_server.set(faults=[{"kind": "malformed", "content": '{"choices": [{"message": {"content": null}}]}'}])
    assert connect().chat(MESSAGES) == ""


def test_map_keeps_the_order_and_asks_num_parallel_at_a_time(judge_server, connect):
    judge_server.set(delay_s=0.1)
    counts = []
    answers = connect(num_parallel=4).map([{"prompt": f"{i:02}"} for i in range(20)], on_done=counts.append)
    assert [answer["choices"][0]["text"] for answer in answers] == [f"{i:02}"[::-1] for i in range(20)]
    assert counts == list(range(1, 21)) and judge_server.most_open() == 4
    assert connect().map([]) == []


def test_several_threads_share_the_number_of_requests_at_a_time(judge_server, connect):
    judge_server.set(delay_s=0.1)
    endpoint, texts = connect(num_parallel=3), {}

    def work(name):
        answers = endpoint.map([{"prompt": f"{name}{i}"} for i in range(4)])
        texts[name] = [answer["choices"][0]["text"] for answer in answers]

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {name: [f"{i}{name}" for i in range(4)] for name in "abcd"}
    assert judge_server.most_open() == 3


def test_an_error_ends_a_map_and_leaves_the_rest_unsent(judge_server, connect):
    judge_server.set(delay_s=0.05, faults=[{"kind": "status", "status": 400, "when": "no5"}])
    with pytest.raises(EndpointError, match="status 400"):
        connect(num_parallel=2).map([{"prompt": f"no{i}"} for i in range(40)])
    time.sleep(0.2)
    assert len(judge_server.log()) < 12


def test_errors_stand_in_their_places_on_request(judge_server, connect):
    judge_server.set(faults=[{"kind": "status", "status": 400, "when": "no1"}])
    answers = connect().map([{"prompt": f"no{i}"} for i in range(3)], return_errors=True)
    assert isinstance(answers[1], EndpointError)
    assert [answers[i]["choices"][0]["text"] for i in (0, 2)] == ["0on", "2on"]


def test_what_cannot_be_sent_is_the_callers_error_also_from_a_map(connect):
    for body in ({"prompt": float("nan")}, {"prompt": {1, 2}}):
        with pytest.raises((ValueError, TypeError)):
            connect().map([body], return_errors=True)


def test_a_process_that_is_interrupted_does_not_wait_for_a_server_that_hangs(judge_server):
    judge_server.set(faults=[{"kind": "hang", "seconds": 60, "times": 9}])
    code = ("import sys; from mindpangu.data.endpoint import Endpoint; "
            "Endpoint(sys.argv[1], 'm').map([{'prompt': str(i)} for i in range(4)])")
    child = subprocess.Popen([sys.executable, "-c", code, judge_server.url], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while judge_server.most_open() < 4:
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in child.communicate(timeout=5)[1]


def test_no_cookie_travels_from_one_request_to_the_next(judge_server, connect):
    judge_server.set(faults=[{"kind": "status", "status": 500, "headers": {"Set-Cookie": "session=1"}}])
    connect().chat(MESSAGES)
    assert len(judge_server.log()) == 2 and "Cookie" not in judge_server.log()[1]["headers"]


# ---- The cache

def test_a_request_in_the_cache_is_not_sent_again_whatever_the_order_of_its_fields(judge_server, connect, tmp_path):
    endpoint = connect(cache=tmp_path)
    first = endpoint.completions({"prompt": "abc", "n": 1})
    assert connect(cache=tmp_path).completions({"n": 1, "prompt": "abc"}) == first
    assert len(judge_server.log()) == 1
    endpoint.completions({"prompt": "abc", "n": 2})
    endpoint.post("/chat/completions", {"messages": MESSAGES})
    endpoint.post("/completions", {"model": "m", "prompt": "abc", "n": 1}, use_cache=False)
    assert len(judge_server.log()) == 4


def test_errors_do_not_enter_the_cache(judge_server, connect, tmp_path):
    judge_server.set(faults=[{"kind": "status", "status": 400}, {"kind": "malformed"}])
    with pytest.raises(EndpointError):
        connect(cache=tmp_path).chat(MESSAGES)
    assert connect(cache=tmp_path).chat(MESSAGES) == SAID and len(judge_server.log()) == 3


def test_a_damaged_entry_is_asked_for_again_and_replaced(judge_server, connect, tmp_path):
    connect(cache=tmp_path).chat(MESSAGES)
    [entry] = tmp_path.rglob("*.json")
    good = entry.read_bytes()
    for damage in (b"", good[:-5], b"[]", b"\xff" * len(good)):
        entry.write_bytes(damage)
        assert connect(cache=tmp_path).chat(MESSAGES) == SAID and entry.read_bytes() == good
    assert len(judge_server.log()) == 5


def test_a_killed_process_leaves_a_cache_that_the_next_one_completes(judge_server, connect, tmp_path):
    judge_server.set(delay_s=0.02)
    code = ("import sys; from mindpangu.data.endpoint import Endpoint; "
            "Endpoint(sys.argv[1], 'm', cache=sys.argv[2]).map([{'prompt': str(i)} for i in range(400)])")
    child = subprocess.Popen([sys.executable, "-c", code, judge_server.url, str(tmp_path)])
    deadline = time.monotonic() + 30
    while len(list(tmp_path.rglob("*.json"))) < 20:
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    entries = list(tmp_path.rglob("*.json"))
    assert 20 <= len(entries) < 400 and all(json.loads(entry.read_text()) for entry in entries)
    judge_server.set()
    answers = connect(cache=tmp_path).map([{"prompt": str(i)} for i in range(400)])
    assert [answer["choices"][0]["text"] for answer in answers] == [str(i)[::-1] for i in range(400)]
    assert len(judge_server.log()) == 400 - len(entries)


# ---- Settings and keys

def test_the_key_is_sent_and_appears_nowhere_else(judge_server, connect, monkeypatch, tmp_path):
    monkeypatch.setenv("THE_KEY", "sk-123\n")
    endpoint = connect(api_key_env="THE_KEY", cache=tmp_path)
    endpoint.chat(MESSAGES)
    assert judge_server.log()[0]["headers"]["Authorization"] == "Bearer sk-123"
    assert not any("sk-123" in path.read_text() for path in tmp_path.rglob("*.json"))
    for status in (401, 500):
        fault = {"kind": "status", "status": status, "message": "your key sk-123 is wrong", "times": 9}
        judge_server.set(faults=[fault])
        with pytest.raises(EndpointError, match=r"your key \*\*\* is wrong") as caught:
            connect(api_key_env="THE_KEY", max_retries=1).chat(MESSAGES)
        assert "sk-123" not in str(caught.value)


def test_a_password_in_netrc_does_not_replace_the_key(judge_server, connect, monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password mine\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("THE_KEY", "sk-123")
    connect(api_key_env="THE_KEY").chat(MESSAGES)
    connect().chat(MESSAGES)
    assert [request["headers"].get("Authorization") for request in judge_server.log()] == ["Bearer sk-123", None]


@pytest.mark.parametrize("value", [None, "", "  ", "sk\n1", "sk-é"])
def test_a_missing_or_unusable_key_is_named_without_showing_it(monkeypatch, value):
    monkeypatch.delenv("THE_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("THE_KEY", value)
    with pytest.raises(ValueError, match="api_key_env=THE_KEY.*export THE_KEY=<") as caught:
        Endpoint("http://127.0.0.1/v1", "m", "THE_KEY")
    assert not (value or "").strip() or value not in str(caught.value)


@pytest.mark.parametrize("url", ["127.0.0.1:8000/v1", "ftp://host/v1", "http:///v1", ""])
def test_a_url_that_is_none_is_named(url):
    with pytest.raises(ValueError, match="url=.*expected an address such as"):
        Endpoint(url, "m")


def test_a_password_in_the_url_is_refused_without_showing_it():
    with pytest.raises(ValueError, match="host.example.*api_key_env") as caught:
        Endpoint("https://me:secret@host.example/v1", "m")
    assert "secret" not in str(caught.value)
