"""A pool of processes that run one function, each call within a wall-clock limit.

For code that may hang or take all memory, such as a computer algebra system: a limit inside the process can't interrupt
it in a long integer operation, and signals don't reach threads. A worker is a fresh interpreter, not a fork (the parent
has threads), that speaks JSON over a socket: 4 bytes of length, then the text.
"""

import contextlib
import fcntl
import importlib
import json
import os
import queue
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

_LENGTH = struct.Struct("!I")
# Importing what the function needs may take long on a busy machine; it is not part of any call.
_START_TIMEOUT_S = 120.0
# The worker searches the parent's path and no other, so that both import the same files.
_PROGRAM = ("import sys; function, memory_bytes, lifeline = sys.argv[1:4]; sys.path[:] = sys.argv[4:]; "
            "from mindpangu.rewards.workers import serve; serve(function, int(memory_bytes), int(lifeline))")


class WorkerDied(RuntimeError):
    """The worker ended in the middle of a call: killed, out of memory, or crashed; or the pool is closed."""


class WorkerPool:
    """num_workers processes for a function given as "package.module:name"; its arguments and its result are JSON.

    timeout_s: wall-clock limit of a call, counted from when the worker is ready; memory_gib: a worker's address space.
    A worker starts when a call needs it, and stays. It ends with the pool, or with the parent, however that ends.
    """

    def __init__(self, function, num_workers, timeout_s, memory_gib=2.0):
        self._function, self._memory_bytes = function, int(memory_gib * 2**30)
        self._num_workers, self._timeout_s = num_workers, timeout_s
        self._lock = threading.Lock()
        self._workers = set()
        self._closed = False
        # The worker that was used last comes first: fewer of them have to start. None: one that has not started.
        self._idle = queue.LifoQueue()
        for _ in range(num_workers):
            self._idle.put(None)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def call(self, *arguments):
        """The function's result, from an idle worker; waits for one. Any thread may call.

        Raises TimeoutError past the limit and WorkerDied if the process ended, both times with another process in its
        place; RuntimeError with the message of what the function raised, or why it can't be imported.
        """
        worker = self._idle.get()
        try:
            if worker is None:
                worker = self._new_worker()
            try:
                answer = worker.call(arguments, self._timeout_s)
            except BaseException:  # after an interrupt, too: the answer to this call would be the next call's
                self._end(worker)
                worker = None
                worker = self._new_worker()  # it gets ready while nobody waits for it
                raise
        finally:
            self._idle.put(worker)
        if "error" in answer:
            raise RuntimeError(f"in the worker: {answer['error']}")
        return answer["result"]

    def close(self):
        """End all workers. Calls under way raise WorkerDied, and so do later ones."""
        with self._lock:
            self._closed = True
            workers = list(self._workers)
        for worker in workers:
            worker.kill()
        for worker in [self._idle.get() for _ in range(self._num_workers)]:
            if worker is not None:
                self._end(worker)
            self._idle.put(None)

    def _new_worker(self):
        with self._lock:
            if self._closed:
                raise WorkerDied("the pool is closed.")
            worker = _Worker(self._function, self._memory_bytes)
            self._workers.add(worker)
            return worker

    def _end(self, worker):
        worker.kill()
        worker.close()
        with self._lock:
            self._workers.discard(worker)


class _Worker:
    """One process, the parent's end of the socket that is its standard input, and the parent's end of its lifeline."""

    def __init__(self, function, memory_bytes):
        self.connection, childs_end = socket.socketpair()
        # Nothing is ever written to it. An end that never leaves this process closes when this process ends.
        lifeline, self._lifeline = os.pipe()
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, function, str(memory_bytes), str(lifeline), *sys.path],
                stdin=childs_end, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=[lifeline],
                start_new_session=True)
        except OSError:
            self.close()
            raise
        finally:
            childs_end.close()
            os.close(lifeline)
        self._is_ready = False

    def call(self, arguments, timeout_s):
        if not self._is_ready:
            self._wait_for_answer(_START_TIMEOUT_S)
            self._is_ready = True
        return self._wait_for_answer(timeout_s, arguments)

    def kill(self):
        """Kill the process and wait for its end. Another thread that waits for its answer gets WorkerDied."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def close(self):
        self.connection.close()
        os.close(self._lifeline)

    def _wait_for_answer(self, timeout_s, request=None):
        deadline = time.monotonic() + timeout_s
        try:
            if request is not None:
                self.connection.settimeout(timeout_s)
                _send(self.connection, request)
            return _receive(self.connection, deadline)
        except TimeoutError:
            raise TimeoutError(f"no answer within {timeout_s:g} s.") from None
        except (ConnectionError, EOFError):
            raise WorkerDied(f"the worker ended with code {self.process.wait()}.") from None


def serve(function, memory_bytes, lifeline):
    """What a worker does: say that it is ready, then answer requests until the parent ends."""
    end_with(lifeline)
    connection = socket.socket(fileno=os.dup(0))
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)  # what the function reads is not the socket
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answer = {"result": None}
    with contextlib.suppress(ConnectionError, EOFError):
        call = _import(function)
        while True:
            _send(connection, answer)
            arguments = _receive(connection)
            try:
                answer = {"result": call(*arguments)}
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"[:1000]}


def _import(function):
    module, _, name = function.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:
        message = f"{function} can't be imported: {type(error).__name__}: {error}"

    def fail(*_):
        raise ImportError(message)

    return fail


def end_with(lifeline):
    """Have the kernel end this process, by SIGIO, as soon as the pipe's other end closes: when the parent ends.

    The function may hold the interpreter's lock for hours, so that nothing in Python would notice, and PR_SET_PDEATHSIG
    fires already when the thread that started this process ends. The socket wouldn't do: its signal for a request that
    has come may still be under way when the request has been read.
    """
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    # An end that closed before gives no signal any more.
    poll = select.poll()
    poll.register(lifeline, select.POLLIN)
    if poll.poll(0):
        sys.exit()


def _send(connection, message):
    text = json.dumps(message).encode()
    connection.sendall(_LENGTH.pack(len(text)) + text)


def _receive(connection, deadline=None):
    (length,) = _LENGTH.unpack(_receive_exactly(connection, _LENGTH.size, deadline))
    return json.loads(_receive_exactly(connection, length, deadline))


def _receive_exactly(connection, count, deadline):
    received = bytearray()
    while len(received) < count:
        if deadline is not None:
            # A timeout of 0 would mean not to wait at all, with an error of another kind.
            connection.settimeout(max(deadline - time.monotonic(), 1e-6))
        part = connection.recv(count - len(received))
        if not part:
            raise EOFError
        received += part
    return bytes(received)
