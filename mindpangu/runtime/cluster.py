"""The ranks of a job that msrun started: who is there, words exchanged between them, and the end of all when one ends.

msrun starts the same command once as scheduler and once per rank. The scheduler's process also runs the hub, a server
that every rank keeps a connection to: small values travel over it (gradients do not, see ops.collectives), and the
kernel closes it with its process. A rank that is killed so ends the others within a second, one whose machine is lost
within a minute, by TCP's keep-alive, which needs no thread of a busy process. MindSpore's own collectives would wait
30 to 60 s and name no rank. One that hangs keeps its connection: what tells is that the others wait in a step for it.
"""

import contextlib
import json
import os
import queue
import selectors
import socket
import struct
import subprocess
import sys
import threading
import time

_LENGTH = struct.Struct("!I")
_PORT_OFFSET = 1  # of the hub, from the port of MindSpore's scheduler
_JOIN_TIMEOUT_S = 120.0
_GREETING_TIMEOUT_S = 5.0  # what connects and then says nothing must not keep ranks out
_GREETING = {"hub": "mindpangu"}
_CHECK_S = 1.0  # between looks at MindSpore's scheduler
# It ends with its parent (prctl's PR_SET_PDEATHSIG): an orphan would keep the port from the next start.
_SCHEDULER = """
import ctypes, os, signal
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
os.environ.setdefault("GLOG_v", "3")
import mindspore.communication
mindspore.communication.init()
"""


class World:
    """The ranks of this job, of which this process is one; alone by default."""

    def __init__(self, rank=0, size=1, connection=None):
        self.rank, self.size, self._connection = rank, size, connection
        self.local_size = 1  # ranks on this machine
        self._answers = queue.SimpleQueue()
        if connection:
            threading.Thread(target=self._listen, daemon=True).start()
            self.local_size = self.gather("machine", socket.gethostname()).count(socket.gethostname())

    @property
    def is_main(self):
        return self.rank == 0

    def gather(self, what, value=None):
        """Every rank's value, a list by rank; JSON-able. All ranks have to call it for the same `what`; it ends when
        the last of them has."""
        if self.size == 1:
            return [value]
        _send(self._connection, {"gather": what, "value": value})
        return self._answers.get()

    def on_main(self, what, function):
        """function()'s result, JSON-able, from rank 0, which alone calls it; the others wait for it."""
        return self.gather(what, function() if self.is_main else None)[0]

    @contextlib.contextmanager
    def meeting(self, what, limit_s):
        """A context in which ranks wait for each other without the hub, as in a step's collectives. Where a rank stays
        in it longer than limit_s, the hub ends the job and names those that have not come to it. limit_s 0: never."""
        if not self._connection or not limit_s:
            yield
            return
        _send(self._connection, {"enter": what, "limit_s": limit_s})
        yield
        _send(self._connection, {"exit": what})

    def fail(self, message):
        """Tell all ranks why this one ends; they end with it."""
        if self._connection:
            connection, self._connection = self._connection, None
            with contextlib.suppress(OSError):
                _send(connection, {"fail": message})

    def leave(self):
        """This rank has done its work."""
        if self._connection:
            connection, self._connection = self._connection, None
            _send(connection, {"leave": True})

    def _listen(self):
        connection = self._connection
        while True:
            try:
                message = _receive(connection)
            except (OSError, EOFError):
                if self._connection is None:
                    return
                message = {"stop": "the scheduler ended"}
            if "stop" in message:
                if self._connection is None:
                    return
                # Not an exception: the main thread may be waiting in a collective for a rank that is gone.
                print(f"error: {message['stop']} (rank {self.rank} ends with it)", file=sys.stderr, flush=True)
                os._exit(1)
            self._answers.put(message["values"])


_world = World()


def world():
    """The World of this process."""
    return _world


def is_scheduler():
    """Whether msrun started this process as its scheduler."""
    return os.environ.get("MS_ROLE") == "MS_SCHED"


def join():
    """Become a rank of the job that msrun started, if it did. Raises ValueError if its hub can't be reached."""
    global _world
    if os.environ.get("MS_ROLE") != "MS_WORKER" or _world.size > 1 or os.environ["MS_WORKER_NUM"] == "1":
        return _world
    rank, size = int(os.environ.get("RANK_ID", -1)), int(os.environ["MS_WORKER_NUM"])
    if not 0 <= rank < size:
        raise ValueError(f"RANK_ID={rank}: over several machines msrun needs --node_rank, the number of each.")
    address = _address()
    deadline = time.monotonic() + _JOIN_TIMEOUT_S
    while True:
        try:
            connection = _connect(address)
            break
        except (OSError, EOFError, ValueError) as error:
            if time.monotonic() > deadline:
                raise ValueError(f"rank {rank} can't reach the job's hub at {address[0]}:{address[1]} ({error}): is "
                                 "the first machine's msrun running, and are its --master_port and the next port "
                                 "free and open? Its scheduler.log may say more.") from None
            time.sleep(0.2)
    _keep_alive(connection)
    _send(connection, {"rank": rank, "size": size, "host": socket.gethostname(), "pid": os.getpid()})
    _world = World(rank, size, connection)
    return _world


def run_scheduler():
    """What the scheduler's process does: MindSpore's scheduler, and the hub. Returns the exit code."""
    size = int(os.environ["MS_WORKER_NUM"])
    if size == 1:
        return subprocess.run([sys.executable, "-c", _SCHEDULER], check=False).returncode
    host, port = _address()
    try:
        server = socket.create_server((host, port), backlog=size)
    except OSError as error:
        print(f"error: port {port} of {host} can't be opened ({error.strerror}): the job needs msrun's --master_port "
              "and the port after it; choose another --master_port.", file=sys.stderr, flush=True)
        return 1
    scheduler = subprocess.Popen([sys.executable, "-c", _SCHEDULER])
    try:
        with server:
            Hub(server, size, scheduler=scheduler).run()
        return 0  # the ranks' processes have ended, and none needs MindSpore's scheduler, which may wait for them still
    except JobFailed as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    finally:
        scheduler.kill()
        scheduler.wait()


class JobFailed(RuntimeError):
    """A rank did not come, ended early or said why it can't go on."""


class Hub:
    """The server: waits for all ranks, passes values on, and stops everyone when one is lost.

    scheduler: the process of MindSpore's scheduler, without which the ranks can't go on.
    """

    def __init__(self, server, size, join_timeout_s=_JOIN_TIMEOUT_S, scheduler=None):
        self._server, self._size, self._join_timeout_s, self._scheduler = server, size, join_timeout_s, scheduler
        self._ranks = {}  # rank -> its connection
        self._names = {}  # rank -> "rank 3 (host, process 1234)"
        self._waiting = {}  # rank -> (what, value) of the gather under way
        self._inside = {}  # rank -> (what, its limit in s, until when) of the meeting that it is in
        self._left = set()

    def run(self):
        """Returns when all ranks have left and their processes have ended. Raises JobFailed, which all ranks that are
        there have been told."""
        try:
            self._accept()
            with selectors.DefaultSelector() as selector:
                for rank, connection in self._ranks.items():
                    selector.register(connection, selectors.EVENT_READ, rank)
                while selector.get_map():
                    # Asked before: ranks that end as they should say so before MindSpore's scheduler can end.
                    ended = self._scheduler and self._scheduler.poll() is not None
                    heard = selector.select(_CHECK_S)
                    if ended and not heard and len(self._left) < self._size:
                        raise self._without_scheduler()
                    for key, _ in heard:
                        if not self._hear(key.data, key.fileobj):
                            selector.unregister(key.fileobj)
                    self._check_time()
        except JobFailed as error:
            for connection in self._ranks.values():
                with contextlib.suppress(OSError):
                    _send(connection, {"stop": str(error)})
            raise
        finally:
            for connection in self._ranks.values():
                connection.close()

    def _accept(self):
        deadline = time.monotonic() + self._join_timeout_s
        while len(self._ranks) < self._size:
            self._server.settimeout(max(0.01, min(_CHECK_S, deadline - time.monotonic())))
            try:
                connection, _ = self._server.accept()
            except TimeoutError:
                if self._scheduler and self._scheduler.poll() is not None:
                    raise self._without_scheduler() from None
                if time.monotonic() < deadline:
                    continue
                missing = sorted(set(range(self._size)) - set(self._ranks))
                raise JobFailed(f"of {self._size} ranks {', '.join(map(str, missing))} did not come within "
                                f"{self._join_timeout_s:g} s: see their log files, and that every machine's msrun was "
                                "started") from None
            connection.settimeout(_GREETING_TIMEOUT_S)
            try:
                _send(connection, _GREETING)
                hello = _receive(connection)
                rank, size, host, process = (hello[name] for name in ("rank", "size", "host", "pid"))
            except (OSError, EOFError, ValueError, KeyError, TypeError):
                connection.close()  # a port scanner, or a rank that died at once and is missed later
                continue
            if rank in self._ranks or size != self._size:
                error = JobFailed(f"rank {rank} of {size} came from {host}, but this job has "
                                  f"{self._size} ranks{', and that one already' * (rank in self._ranks)}: another job "
                                  "uses this --master_port, or --node_rank or --worker_num is wrong on a machine")
                with connection, contextlib.suppress(OSError):
                    _send(connection, {"stop": str(error)})
                raise error
            connection.settimeout(None)
            _keep_alive(connection)
            self._ranks[rank] = connection
            self._names[rank] = f"rank {rank} ({host}, process {process})"

    def _hear(self, rank, connection):
        """One message of a rank; False at its end."""
        try:
            message = _receive(connection)
        except (OSError, EOFError):
            if rank in self._left:
                return False
            raise self._lost(rank) from None
        if "fail" in message:
            raise JobFailed(f"{self._names[rank]} stopped: {message['fail']}")
        if "leave" in message:
            self._left.add(rank)
        elif "enter" in message:
            self._inside[rank] = message["enter"], message["limit_s"], time.monotonic() + message["limit_s"]
        elif "exit" in message:
            del self._inside[rank]
        else:
            self._waiting[rank] = message["gather"], message["value"]
        if self._left and self._waiting:
            raise JobFailed(f"{self._names[min(self._left)]} has finished, but {self._names[min(self._waiting)]} waits "
                            f"for it: {self._waiting[min(self._waiting)][0]}")
        if len(self._waiting) == self._size:
            different = {what for what, _ in self._waiting.values()}
            if len(different) > 1:
                raise JobFailed("the ranks do different things: " + "; ".join(
                    f"rank {r}: {what}" for r, (what, _) in sorted(self._waiting.items())))
            values = [self._waiting[r][1] for r in range(self._size)]
            self._waiting = {}
            for r, other in self._ranks.items():
                try:
                    _send(other, {"values": values})
                except OSError:
                    raise self._lost(r) from None
        return True

    def _check_time(self):
        now = time.monotonic()
        late = [rank for rank, (_, _, end) in self._inside.items() if now > end]
        if not late:
            return
        what, limit_s, _ = self._inside[min(late)]
        there = {rank for rank, (other, _, _) in self._inside.items() if other == what}
        absent = ", ".join(name for rank, name in sorted(self._names.items()) if rank not in there)
        found = (f"{absent} did not come to {what}, where another has waited for {limit_s:g} s: it hangs" if absent else
                 f"all ranks have been in {what} for {limit_s:g} s: one of them hangs, or a link between them")
        raise JobFailed(f"{found}; see their log files. If it takes as long, raise run.step_timeout_s={limit_s:g}; the "
                        "same command resumes from the last checkpoint")

    def _without_scheduler(self):
        """It ends at a port in use, and half a minute after a rank's process was stopped, which it does not name."""
        found = f"MindSpore's scheduler ended with {self._scheduler.returncode}: scheduler.log says why"
        there = self._waiting or self._inside
        absent = ", ".join(name for rank, name in sorted(self._names.items()) if rank not in there)
        if not there:
            return JobFailed(f"{found}; if --master_port is in use, choose another")
        what = next(iter(there.values()))[0]
        found += (f"; {absent} did not come to {what}, where others wait: it hangs or was stopped" if absent else
                  f" and names the rank that it lost; all were in {what}")
        return JobFailed(f"{found}. The same command resumes from the last checkpoint")

    def _lost(self, rank):
        return JobFailed(f"{self._names[rank]} is gone: it was killed, or its machine was lost; the same command "
                         "resumes from the last checkpoint")


def _connect(address):
    """A connection to the hub, which greets; something else at its port doesn't."""
    connection = socket.create_connection(address, timeout=_GREETING_TIMEOUT_S)
    try:
        if _receive(connection) != _GREETING:
            raise ValueError("something else listens there")
    except Exception:
        connection.close()
        raise
    return connection


def _address():
    return os.environ["MS_SCHED_HOST"], int(os.environ["MS_SCHED_PORT"]) + _PORT_OFFSET


def _keep_alive(connection):
    """A peer whose machine is gone is noticed within 10 + 3 x 10 s."""
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3),
                          (socket.TCP_USER_TIMEOUT, 40_000)):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


def _send(connection, message):
    text = json.dumps(message).encode()
    connection.sendall(_LENGTH.pack(len(text)) + text)


def _receive(connection):
    (length,) = _LENGTH.unpack(_receive_exactly(connection, _LENGTH.size))
    return json.loads(_receive_exactly(connection, length))


def _receive_exactly(connection, count):
    received = bytearray()
    while len(received) < count:
        part = connection.recv(count - len(received))
        if not part:
            raise EOFError
        received += part
    return bytes(received)
