"""A client for OpenAI-compatible servers: retries, a number of requests at a time, answers kept on disk."""

import email.utils
import json
import os
import queue
import random
import threading
import time
from collections import deque
from http.cookiejar import DefaultCookiePolicy
from pathlib import Path
from urllib.parse import urlsplit

import requests
import urllib3
import xxhash

_CONNECT_TIMEOUT_S = 10.0
_LONGEST_PAUSE_S = 30.0  # between two attempts, unless the server asks for more
_LONGEST_RETRY_AFTER_S = 300.0  # that a server may ask for; beyond it the request has failed
_BROKEN_EXCHANGE = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError,
                    urllib3.exceptions.HTTPError)


class EndpointError(OSError):
    """A request that got no usable answer. refused: the server answered that it will not have it (4xx)."""

    def __init__(self, message, refused=False):
        super().__init__(message)
        self.refused = refused


def connect(server, cache=None):
    """The Endpoint of a ServerConfig whose url is set."""
    return Endpoint(server.url, server.model, server.api_key_env, timeout_s=server.timeout_s,
                    max_retries=server.max_retries, num_parallel=server.num_parallel, cache=cache)


class Endpoint:
    """An OpenAI-compatible server and a model on it; all methods may be called from many threads.

    url: what the paths are appended to, for example http://127.0.0.1:8000/v1. api_key_env: the environment variable
    that holds the key, which is sent and never written anywhere. timeout_s: of one attempt from sending to the last
    byte, and as long again where bytes stop midway. max_retries: further attempts, with a pause that doubles from
    backoff_s on, after broken connections, timeouts, unreadable answers and the statuses 408, 429 (Retry-After is
    obeyed) and 5xx. num_parallel: requests at a time. cache: a folder in which answers are kept: a request that was
    answered once, even if it samples, is not sent again, also after the process was killed.
    Raises ValueError for settings that cannot work.
    """

    def __init__(self, url, model, api_key_env=None, *, timeout_s=60.0, max_retries=5, num_parallel=8, cache=None,
                 backoff_s=0.5):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url={url!r}: expected an address such as http://127.0.0.1:8000/v1.")
        if parts.username is not None:
            raise ValueError(f"the url of {parts.hostname} holds a name or password, which would end up in logs: put "
                             "the key into an environment variable and give its name as api_key_env.")
        self._key = os.environ.get(api_key_env, "").strip() if api_key_env else ""
        if api_key_env and not (self._key and self._key.isascii() and self._key.isprintable()):
            raise ValueError(f"api_key_env={api_key_env}: this environment variable is not set, empty or no key; "
                             f"export {api_key_env}=<the key of {url}>.")
        self.url, self.model = url.rstrip("/"), model
        self.timeout_s, self.max_retries, self.num_parallel = timeout_s, max_retries, num_parallel
        self.cache, self.backoff_s = cache and Path(cache), backoff_s
        self._slots = threading.BoundedSemaphore(num_parallel)
        self._session = requests.Session()
        # Cookies are the one state that a session shared by threads would change.
        self._session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=num_parallel))

    def post(self, path, body, use_cache=True):
        """The JSON object that the server answers to a JSON body. Raises EndpointError if there is none to get."""
        encoded = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
        kept = None
        if self.cache and use_cache:
            digest = xxhash.xxh3_128_hexdigest(f"{path}\n{encoded}".encode())
            kept = self.cache / digest[:2] / f"{digest}.json"
            answer = _read_kept(kept)
            if answer is not None:
                return answer
        answer = self._ask(path, encoded.encode())
        if kept:
            _keep(kept, answer)
        return answer

    def completions(self, body):
        """The answer to {"prompt": ..., ...} for this endpoint's model."""
        return self.post("/completions", {"model": self.model, **body})

    def chat(self, messages, **options):
        """What the model says after messages, dictionaries {"role", "content"}; options: further fields."""
        return self.chat_content(self.post("/chat/completions", self.chat_body(messages, **options)))

    def chat_body(self, messages, **options):
        return {"model": self.model, "messages": list(messages), **options}

    def chat_content(self, answer):
        """The text in an answer to a chat_body; "" where the model wrote nothing but thoughts."""
        try:
            content = answer["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            content = 0
        if not isinstance(content, str | None):
            raise EndpointError(f"{self.url}/chat/completions: the answer {_shown(json.dumps(answer))} has no "
                                "choices[0].message.content: expected an OpenAI-compatible server; check the url.")
        return content or ""

    def map(self, bodies, path="/completions", on_done=None, return_errors=False, read=None):
        """The answers to many bodies, in their order, num_parallel asked at a time.

        on_done(count) is called after each answer with how many there are. The first EndpointError is raised and the
        remaining bodies are not sent; with return_errors it stands in the place of its answer instead, with
        return_errors="refused" only where the server refused the request.
        read(i, answer) is called in the thread that asked, and what it returns is kept instead of the answer: for
        answers that together would fill the memory.
        """
        answers, pending, finished = [None] * len(bodies), deque(enumerate(bodies)), queue.SimpleQueue()

        def work():
            while True:
                try:
                    i, body = pending.popleft()
                except IndexError:
                    return
                try:
                    answer = self.post(path, body)
                    finished.put((i, read(i, answer) if read else answer, None))
                except Exception as error:  # noqa: BLE001 - raised below, in the thread that called
                    finished.put((i, None, error))

        # Daemons, unlike an executor's threads: a process that is stopped does not wait for a server that hangs.
        for _ in range(min(self.num_parallel, len(bodies))):
            threading.Thread(target=work, daemon=True).start()
        try:
            for count in range(1, len(bodies) + 1):
                i, answers[i], error = finished.get()
                if error is not None:
                    if not (return_errors and isinstance(error, EndpointError)
                            and (error.refused or return_errors != "refused")):
                        raise error
                    answers[i] = error
                if on_done:
                    on_done(count)
        finally:
            pending.clear()
        return answers

    def _ask(self, path, data):
        url = f"{self.url}{path}"
        for attempt in range(self.max_retries + 1):
            wait_s = 0.0
            try:
                status, headers, content = self._exchange(url, data)
            except _BROKEN_EXCHANGE as error:
                reason = f"no answer within timeout_s={self.timeout_s:g}" if _is_timeout(error) else str(error)
            else:
                text = content.decode("utf-8", "replace")
                if 200 <= status < 300:
                    answer = _parse_object(text)
                    if answer is not None:
                        return answer
                    reason = f"status {status} with {_shown(text)!r}, which is no JSON object"
                else:
                    reason = f"status {status}: {_shown(_error_message(text))}"
                    if status not in (408, 429) and status < 500:
                        raise EndpointError(self._hide_key(f"{url}: {reason} {_advice(status)}"), refused=status >= 400)
                    wait_s = _retry_after_s(headers)
                    if wait_s > _LONGEST_RETRY_AFTER_S:
                        reason += f" (asks to wait {wait_s:.0f} s)"
                        break
            if attempt < self.max_retries:
                pause_s = min(_LONGEST_PAUSE_S, self.backoff_s * 2**attempt) * random.uniform(0.5, 1.0)
                time.sleep(max(wait_s, pause_s))
        raise EndpointError(self._hide_key(
            f"{url}: {reason}; given up after {attempt + 1} attempts. Check that the server runs at this url and keeps "
            "up, or raise timeout_s or max_retries."))

    def _exchange(self, url, data):
        """(status, headers, content) of one attempt."""
        with self._slots:
            deadline = time.monotonic() + self.timeout_s
            with self._session.post(url, data=data, headers={"Content-Type": "application/json"}, auth=self._authorize,
                                    stream=True, allow_redirects=False,
                                    timeout=(min(_CONNECT_TIMEOUT_S, self.timeout_s), self.timeout_s)) as response:
                parts = []
                # A library's timeout restarts with every byte, and some servers send blank lines while they queue.
                while part := response.raw.read1(1 << 16, decode_content=True):
                    parts.append(part)
                    if time.monotonic() > deadline:
                        raise requests.Timeout()
                return response.status_code, response.headers, b"".join(parts)

    def _authorize(self, request):
        # As an auth callable: without one, requests sends what ~/.netrc holds for the host in place of a key.
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def _hide_key(self, text):
        return text.replace(self._key, "***") if self._key else text


def _is_timeout(error):
    return isinstance(error, (requests.Timeout, urllib3.exceptions.TimeoutError))


def _parse_object(text):
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _error_message(text):
    """What a server says in an error: OpenAI's {"error": {"message"}}, FastAPI's {"detail"}, or the text itself."""
    answer = _parse_object(text) or {}
    error = answer.get("error", answer.get("message", answer.get("detail")))
    message = error.get("message") if isinstance(error, dict) else error
    return str(message or text).strip()


def _advice(status):
    if status < 400:
        return "(expected an answer: give the url that the server itself has)"
    if status in (401, 403):
        return "(check the key in the variable that api_key_env names)"
    if status == 404:
        return "(check the url, which often ends in /v1, and the model's name)"
    return "(the request was refused)"


def _retry_after_s(headers):
    """Seconds in Retry-After, a number or a date; 0 without one."""
    text = headers.get("Retry-After", "")
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0


def _shown(text):
    return text if len(text) <= 500 else text[:497] + "..."


def _read_kept(path):
    try:
        return _parse_object(path.read_bytes())  # a file that lost its end in a power cut: asked again
    except FileNotFoundError:
        return None


def _keep(path, answer):
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.stem}.{os.getpid()}.{threading.get_ident()}.writing")
    aside.write_text(json.dumps(answer), encoding="utf-8")
    os.replace(aside, path)
