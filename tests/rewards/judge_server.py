"""A stand-in for a language model that judges, behind real HTTP: `running_judge` starts it as a process of its own.

Tests load this file by its path: runpy.run_path(path)["running_judge"].

POST /v1/chat/completions: the better answer is the one with the longer stretch of KEYWORD in it; a mark is 1 plus that
length, at most 10, in the form that the request asks for. POST /v1/completions: each prompt comes back reversed.
POST /control sets the fields of State that it holds; GET /log lists the requests since the last /control.
"""

import contextlib
import json
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEYWORD = "excellent"
ANSWER = re.compile(r"<answer(| [AB]) ([0-9a-f]{16})>\n(.*?)\n</answer\1 \2>", re.DOTALL)


@dataclass
class State:
    # Each fault has "kind", one of FAULTS, and may have "when", a stretch that the request's body holds, and "times",
    # how many requests it meets (1). The first that applies does.
    faults: list = field(default_factory=list)
    # What the judge writes instead of its verdict: {"text", "when", "times"} as above; {verdict} stands for it.
    replies: list = field(default_factory=list)
    prefers: str | None = None  # a place, "A" or "B", whatever stands there
    delay_s: float = 0.0  # before every answer
    log: list = field(default_factory=list)
    num_open: int = 0  # requests at this moment
    most_open: int = 0


state, lock = State(), threading.Lock()


def quality(text):
    """Length of the longest stretch of KEYWORD in text, 0 if it is a single letter."""
    return max(length for length in (0, *range(2, len(KEYWORD) + 1))
               if any(KEYWORD[start:start + length] in text for start in range(len(KEYWORD) - length + 1)))


def verdict(prompt):
    answers = [quality(text) for _, _, text in ANSWER.findall(prompt)]
    if len(answers) == 1:
        return json.dumps({"score": min(10, 1 + answers[0])})
    first, second = answers
    winner = state.prefers or ("tie" if first == second else "A" if first > second else "B")
    return json.dumps({"winner": winner})


def take(rules, body):
    """The first rule that applies to the body, which is used up by it."""
    with lock:
        for rule in rules:
            if rule.get("when", "") in body and rule.setdefault("times", 1) > 0:
                rule["times"] -= 1
                return rule
    return None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self):
        with lock:
            self.answer({"log": state.log, "most_open": state.most_open})

    def do_POST(self):
        global state
        text = self.rfile.read(int(self.headers["Content-Length"])).decode()
        body = json.loads(text)
        if self.path == "/control":
            with lock:
                state = State(**body)
            self.answer({})
            return
        with lock:
            counted = state  # where a request that hangs is counted, also after the next test's `set`
            state.log.append({"path": self.path, "body": body, "time": time.time(), "headers": dict(self.headers)})
            state.num_open += 1
            state.most_open = max(state.most_open, state.num_open)
        try:
            time.sleep(state.delay_s)
            fault = take(state.faults, text)
            if fault:
                FAULTS[fault["kind"]](self, fault)
            elif self.path.endswith("/chat/completions"):
                said = verdict("\n".join(message["content"] for message in body["messages"]))
                reply = take(state.replies, text)
                content = reply["text"].replace("{verdict}", said) if reply else said
                self.answer({"choices": [{"index": 0, "finish_reason": "stop",
                                          "message": {"role": "assistant", "content": content}}]})
            else:
                self.answer({"choices": [{"index": 0, "text": body["prompt"][::-1]}]})
        finally:
            with lock:
                counted.num_open -= 1

    def answer(self, body, status=200, **headers):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(content)

    def fail(self, fault):
        error = {"error": {"message": fault.get("message", "a fault on request")}}
        self.answer(error, fault["status"], **fault.get("headers", {}))

    def hang(self, fault):
        time.sleep(fault["seconds"])
        self.close_connection = True

    def malform(self, fault):
        self.answer(fault.get("content", '{"choices": [').encode())

    def close(self, fault):
        """Cut the connection, after fault["bytes"] of an answer."""
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"[:fault["bytes"]])
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def trickle(self, fault):
        """A byte every 20 ms for fault["seconds"]: no read ever waits long."""
        self.send_response(200)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        end = time.monotonic() + fault["seconds"]
        while time.monotonic() < end:
            self.wfile.write(b"\n")
            time.sleep(0.02)
        self.close_connection = True

    def handle(self):
        try:
            super().handle()
        except ConnectionError:  # a client that gave up
            pass

    def log_message(self, *_):
        pass


FAULTS = {"status": Handler.fail, "hang": Handler.hang, "malformed": Handler.malform, "close": Handler.close,
          "trickle": Handler.trickle}


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


class Judge:
    """The process as a test sees it. url: for an Endpoint."""

    def __init__(self, port):
        self.root = f"http://127.0.0.1:{port}"
        self.url = f"{self.root}/v1"

    def set(self, **fields):
        """Set the fields of State, the others go back to their defaults."""
        self._fetch("/control", json.dumps(fields).encode())

    def log(self):
        """The requests since `set`: {"path", "body", "time", "headers"} each."""
        return self._fetch("/log")["log"]

    def most_open(self):
        """How many requests were open at a time since `set`, at most."""
        return self._fetch("/log")["most_open"]

    def _fetch(self, path, data=None):
        with urllib.request.urlopen(self.root + path, data, timeout=10) as response:
            return json.load(response)


@contextlib.contextmanager
def running_judge():
    with subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Judge(int(process.stdout.readline()))
        finally:
            process.kill()


if __name__ == "__main__":
    server = Server(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()
