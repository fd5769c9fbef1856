"""Oracle: what is left of hostile programs, seen from outside: in /proc, on disk, at a server's door."""

import errno
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mindpangu.rewards.sandbox import Isolation, Program, Sandbox, describe_isolation, try_isolations

ROOT = Path(__file__).resolve().parents[2]
SAFE = [isolation for isolation in try_isolations() if not isolation.missing]
needs_isolation = pytest.mark.skipif(not SAFE, reason="this machine cannot isolate programs")
needs_namespaces = pytest.mark.skipif(not SAFE or not SAFE[0].namespaces, reason="this machine allows no namespaces")
# A name for a process and its descendants that nothing else on the machine has, which they cannot hide from /proc.
NAME_ITSELF = "import ctypes; ctypes.CDLL(None).prctl(15, b'{name}', 0, 0, 0)\n"


@pytest.fixture(params=SAFE, ids=str)
def sandbox(request):
    return Sandbox(timeout_s=5, isolation=request.param)


def new_name():
    return "pangu" + uuid.uuid4().hex[:10]  # the kernel keeps 15 characters


def processes_named(name):
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "comm").read_text().strip() == name:
                found.append(int(folder.name))
        except (FileNotFoundError, ProcessLookupError):
            pass
    return found


def wait_until(condition, timeout_s=20):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


def test_output_and_exit_code_are_the_programs_own(sandbox):
    outcome = sandbox.run(Program("import sys; print(6 * 7, flush=True); print('no', file=sys.stderr); sys.exit(3)"))
    assert outcome == ("ended", (3,), (b"42\nno\n",), "")


def test_a_program_reads_its_input_and_then_the_end(sandbox):
    read = "import sys; print(sys.stdin.read().upper(), end='|'); print(sys.stdin.read(), end='|')"
    assert sandbox.run(Program(read, "grüße".encode())).outputs == ("GRÜSSE||".encode(),)
    assert sandbox.run(Program(read)).outputs == (b"||",)


def test_two_programs_talk_through_their_pipes_and_end_with_the_first(sandbox):
    asks = "import os; os.write(4, b'abc'); print(os.read(3, 9).decode())"
    answers = "import os, time; os.write(4, os.read(3, 9).upper()); time.sleep(100)"
    started = time.monotonic()
    assert sandbox.run(Program(asks), Program(answers)) == ("ended", (0, None), (b"ABC\n", b""), "")
    assert time.monotonic() - started < 4


def test_the_second_program_may_end_after_the_first_with_its_own_exit_code(sandbox):
    ends = "import os, time; os.write(4, b'x'); time.sleep(0.05); os._exit(3)"
    assert sandbox.run(Program("import os; os.read(3, 1)"), Program(ends)).exit_codes == (0, 3)


def test_waiting_costs_no_processor_time(sandbox):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    sandbox.run(Program("import os, time; os.close(1); os.close(2); time.sleep(2)"))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5  # of 2 s; a start takes 0.03


@needs_isolation
@pytest.mark.parametrize("program", [
    "while True: pass",
    "import time; time.sleep(100)",
    "import signal, time\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except OSError: pass\n"
    "while True: pass",
    "import threading\nfor _ in range(4): threading.Thread(target=lambda: [None for _ in iter(int, 1)]).start()",
    "import os\nos.close(1)\nos.close(2)\nwhile True: pass",
], ids=["busy", "asleep", "ignores signals", "threads", "closes its output"])
def test_a_program_that_never_ends_is_ended_at_its_time(program):
    started = time.monotonic()
    outcome = Sandbox(timeout_s=1).run(Program(program))
    assert (outcome.reason, outcome.exit_codes) == ("timeout", (None,))
    assert 1 <= time.monotonic() - started < 6  # the machine may be busy


def test_a_gigabyte_is_refused(sandbox):
    outcome = sandbox.run(Program("try: b'x' * 10**9\nexcept MemoryError: print('refused')"))
    assert outcome.outputs == (b"refused\n",)


def test_a_hundred_megabytes_of_output_end_the_program_and_are_not_kept(sandbox):
    outcome = sandbox.run(Program("import os\nfor _ in range(100): os.write(1, b'x' * 10**6)"))
    assert (outcome.reason, outcome.exit_codes, len(outcome.outputs[0])) == ("output_limit", (None,), 256 * 1024)


def test_too_much_output_is_noticed_of_a_program_that_has_ended(sandbox):
    # Within the pipe's capacity, so that the program ends without waiting for a reader.
    outcome = sandbox.run(Program("print('x' * 3000)", max_output_kib=2))
    assert (outcome.reason, len(outcome.outputs[0])) == ("output_limit", 2048)


def test_a_fork_bomb_stays_small_and_leaves_nothing(sandbox):
    name = new_name()
    bomb = NAME_ITSELF.format(name=name) + "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    most = 0
    with ThreadPoolExecutor(1) as threads:
        run = threads.submit(Sandbox(timeout_s=2, isolation=sandbox.isolation).run, Program(bomb))
        while not run.done():
            most = max(most, len(processes_named(name)))
    assert 2 <= most <= 8
    assert run.result().reason == "timeout"
    assert processes_named(name) == []


@pytest.mark.parametrize("isolation", [*SAFE, Isolation()], ids=str)
def test_a_grandchild_that_leaves_session_and_parent_is_ended(isolation):
    name = new_name()
    leaves = NAME_ITSELF.format(name=name) + (
        "import os, signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(1000)\n    os._exit(0)\n"
        "time.sleep(2)")
    with ThreadPoolExecutor(1) as threads:
        run = threads.submit(Sandbox(isolation=isolation, allow_unsafe=True).run, Program(leaves))
        wait_until(lambda: len(processes_named(name)) >= 2)
        assert run.result().reason == "ended"
    assert processes_named(name) == []


def test_files_outside_cannot_be_read_or_listed(sandbox, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("for nobody")
    places = ["/etc/passwd", "/etc/hostname", str(secret), __file__, str(ROOT), "/var", "/sys",
              f"/proc/{os.getpid()}/environ", f"/proc/{os.getpid()}/fd", "/proc/1/cmdline", "/proc/self/mem",
              "/dev/zero", "/dev/shm"]
    program = f"""
import os
for place in {places}:
    for attempt in (lambda: open(place, "rb").read(1), lambda: os.listdir(place), lambda: os.open(place, os.O_RDWR)):
        try: print(place, attempt())
        except OSError: pass
print("stands:", bool(open(os.__file__).read()))
"""
    assert sandbox.run(Program(program)).outputs == (b"stands: True\n",)


def test_nothing_outside_can_be_written_moved_or_removed(sandbox, tmp_path):
    tmp_path.chmod(0o777)
    kept = tmp_path / "kept"
    kept.write_text("as it was")
    kept.chmod(0o666)
    mark = new_name()
    program = f"""
import os
for attempt in (lambda: open({str(kept)!r}, "w").write("changed"), lambda: os.remove({str(kept)!r}),
                lambda: os.rename({str(kept)!r}, {str(kept) + "2"!r}), lambda: open({str(tmp_path / mark)!r}, "w"),
                lambda: open("/dev/shm/{mark}", "w"), lambda: os.mkdir("/{mark}"), lambda: open("/tmp/{mark}", "w"),
                lambda: open(os.path.dirname(os.__file__) + "/{mark}.py", "w"), lambda: os.truncate(os.__file__, 0)):
    try: attempt()
    except OSError: pass
"""
    assert sandbox.run(Program(program)).exit_codes == (0,)
    assert kept.read_text() == "as it was" and os.listdir(tmp_path) == ["kept"]
    library = os.path.dirname(os.__file__)
    assert not any(mark in name for place in ("/", "/tmp", "/dev/shm", library) for name in os.listdir(place))


@needs_namespaces
def test_the_programs_own_folder_is_empty_private_and_gone_afterwards():
    uses = ("import os, tempfile; print(os.listdir('.'), os.getcwd() == os.environ['HOME'])\n"
            "open('a', 'w').write('b'); print(open('a').read(), tempfile.NamedTemporaryFile().write(b'abc'))")
    for _ in range(2):
        assert Sandbox().run(Program(uses)).outputs == (b"[] True\nb 3\n",)


@needs_namespaces
def test_a_program_cannot_fill_the_disk():
    fills = """
import os
total = 0
for number in range(2000):
    try:
        with open(f"file{number}", "wb") as file:
            while True:
                total += file.write(b"x" * 2**16)
                file.flush()
    except OSError: pass
print(total)
"""
    outcome = Sandbox(timeout_s=20).run(Program(fills))
    assert outcome.reason == "ended" and 2**20 < int(outcome.outputs[0]) < 32 * 2**20


def test_other_processes_cannot_be_killed_or_traced(sandbox):
    # Of the same user that programs run as where the sandbox does not change it.
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"]) as victim:
        program = f"""
import ctypes, os, signal
libc = ctypes.CDLL(None, use_errno=True)
targets = [{victim.pid}, {os.getpid()}, {os.getppid()}, os.getppid(), -1, 0]
for target in targets:
    for number in (signal.SIGTERM, signal.SIGSTOP, signal.SIGKILL):
        try: os.kill(target, number) if target not in (-1, 0) else os.fork() or os.kill(target, number)
        except OSError: pass
for target in (*targets[:4], *range(1, 400)):
    if target not in (0, os.getpid()) and libc.ptrace(16, target, 0, 0) == 0: print("traces", target)
    piece = ctypes.create_string_buffer(8)
    vector = (ctypes.c_size_t * 2)(ctypes.addressof(piece), 8)
    place = (ctypes.c_size_t * 2)(id(None), 8)
    if target != os.getpid() and libc.process_vm_readv(target, vector, 1, place, 1, 0) > 0: print("reads", target)
"""
        outcome = sandbox.run(Program(program))
        assert victim.poll() is None
        victim.kill()
    assert outcome.reason == "ended" and outcome.outputs[0] == b""


def test_no_server_of_this_machine_hears_from_a_program(sandbox):
    abstract = "\0" + new_name()
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind(abstract)
        local.listen()
        program = f"""
import socket
for family, address in ((socket.AF_INET, ("127.0.0.1", {server.getsockname()[1]})), (socket.AF_UNIX, {abstract!r})):
    try:
        with socket.socket(family) as client: client.connect(address)
        print("connected to", address)
    except OSError: pass
try: print(socket.getaddrinfo("pypi.org", 443))
except OSError: print("no names")
"""
        assert sandbox.run(Program(program)).outputs == (b"no names\n",)
        for door in (server, local):
            door.settimeout(0.2)
            with pytest.raises(TimeoutError):
                door.accept()


def test_a_program_inherits_no_descriptors_and_no_environment(sandbox, tmp_path, monkeypatch):
    monkeypatch.setenv("PANGU_SECRET", "for nobody")
    secret = tmp_path / "secret"
    secret.write_text("for nobody")
    program = """
import os, sys
found = []
for descriptor in range(1024):
    try: os.fstat(descriptor)
    except OSError: continue
    found.append(descriptor)
print(found, sorted(os.environ), sys.argv)
"""
    with open(secret) as file:
        os.set_inheritable(file.fileno(), True)
        assert sandbox.run(Program(program)).outputs == (b"[0, 1, 2] ['HOME', 'LANG', 'TMPDIR'] ['program']\n",)


def test_sets_have_the_same_order_in_every_run(sandbox):
    runs = {sandbox.run(Program("print(set('abcdefghij'))")).outputs for _ in range(3)}
    assert len(runs) == 1


def test_a_program_has_no_privileges_to_use_or_to_gain(sandbox):
    program = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
held = (ctypes.c_uint32 * 6)()
get_version_3 = (ctypes.c_uint32 * 2)(0x20080522, 0)
libc.capget(get_version_3, held)
print(list(held), libc.prctl(39, 0, 0, 0, 0))  # PR_GET_NO_NEW_PRIVS
print(libc.mount(b"none", b"/tmp", b"tmpfs", 0, None), libc.chroot(b"/tmp"))
"""
    assert sandbox.run(Program(program)).outputs == (b"[0, 0, 0, 0, 0, 0] 1\n-1 -1\n",)


@needs_namespaces
def test_memory_that_counts_in_no_limit_of_a_process_is_not_to_be_had():
    program = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
print(libc.shmget(0, 4096, 0o1600), libc.msgget(0, 0o1600), libc.semget(0, 1, 0o1600), libc.unshare(0x10000000))
"""
    assert Sandbox().run(Program(program)).outputs == (b"-1 -1 -1 -1\n",)


def test_a_program_cannot_reach_the_other_but_through_the_pipes(sandbox):
    # The first has the second in its limits of time only; the second does all that it can to the first.
    waits = "import os, time; print(len(os.read(3, 5))); time.sleep(1); print('unharmed')"
    attacks = """
import ctypes, os, signal
libc = ctypes.CDLL(None)
os.write(4, b"x")
for pid in (os.getppid(), *range(1, 400)):
    if pid not in (0, os.getpid()):
        libc.ptrace(16, pid, 0, 0)
        try: os.kill(pid, signal.SIGKILL)
        except OSError: pass
"""
    outcome = sandbox.run(Program(waits), Program(attacks))
    assert outcome.outputs[0] == b"1\nunharmed\n" and outcome.exit_codes == (0, 0)


def test_runs_side_by_side_keep_apart(sandbox):
    def run(number):
        return sandbox.run(Program("import sys, time; time.sleep(0.2); print(sys.stdin.read())", str(number).encode()))

    with ThreadPoolExecutor(8) as threads:
        outcomes = list(threads.map(run, range(16)))
    assert [outcome.outputs[0] for outcome in outcomes] == [f"{number}\n".encode() for number in range(16)]


@pytest.mark.skipif(not any(isolation.uid for isolation in SAFE), reason="programs have no users of their own here")
def test_programs_of_different_trainers_have_different_users():
    asks = ("from mindpangu.rewards.sandbox import Program, Sandbox\n"
            "print(Sandbox().run(Program('import os; print(os.getuid())')).outputs)")
    users = {subprocess.run([sys.executable, "-c", asks], cwd=ROOT, capture_output=True, check=True).stdout
             for _ in range(3)}
    assert len(users) > 1  # of 1000: three are the same once in a million runs


@needs_isolation
def test_programs_die_with_the_process_that_runs_them():
    name = new_name()
    runs = ("from mindpangu.rewards.sandbox import Program, Sandbox\n"
            f"Sandbox(timeout_s=60).run(Program({NAME_ITSELF.format(name=name) + 'import time; time.sleep(60)'!r}))")
    with subprocess.Popen([sys.executable, "-c", runs], cwd=ROOT) as trainer:
        wait_until(lambda: processes_named(name))
        trainer.kill()
    wait_until(lambda: not processes_named(name), timeout_s=5)


def test_programs_die_with_the_launcher_and_the_run_says_so(sandbox):
    name = new_name()
    with ThreadPoolExecutor(1) as threads:
        run = threads.submit(sandbox.run, Program(NAME_ITSELF.format(name=name) + "import time; time.sleep(60)"))
        wait_until(lambda: processes_named(name))
        status = Path(f"/proc/{processes_named(name)[0]}/status").read_text()
        os.kill(int(status.split("PPid:")[1].split()[0]), signal.SIGKILL)
        assert run.result() == ("sandbox_error", (), (), "the launcher ended with -9")
    wait_until(lambda: not processes_named(name), timeout_s=5)


def test_where_memory_runs_out_the_kernel_takes_programs_first(sandbox):
    name = new_name()
    with ThreadPoolExecutor(1) as threads:
        run = threads.submit(sandbox.run, Program(NAME_ITSELF.format(name=name) + "import time; time.sleep(1)"))
        wait_until(lambda: processes_named(name))
        assert Path(f"/proc/{processes_named(name)[0]}/oom_score_adj").read_text() == "1000\n"
        assert run.result().exit_codes == (0,)


def test_the_callers_threads_and_children_are_left_alone(sandbox):
    ticks = []
    stop = threading.Event()

    def tick():
        while not stop.wait(0.01):
            ticks.append(time.monotonic())

    thread = threading.Thread(target=tick)
    thread.start()
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as child:
        before = len(ticks)
        sandbox.run(Program("import os; os.kill(-1, 9)"))
        sandbox.run(Program("import os; os.abort()"))
        wait_until(lambda: len(ticks) > before + 2)
        assert child.poll() is None
        child.communicate()
        assert child.returncode == 0
    stop.set()
    thread.join()


def test_without_isolation_the_user_has_to_say_so():
    with pytest.raises(ValueError, match="files and processes.*rewards.code.allow_unsafe=true"):
        Sandbox(isolation=Isolation())
    with pytest.raises(ValueError, match="cannot isolate the files of"):
        Sandbox(isolation=Isolation(uid=True))
    with pytest.raises(ValueError, match="cannot isolate the processes of"):
        Sandbox(isolation=Isolation(landlock=5))
    assert Sandbox(isolation=Isolation(), allow_unsafe=True).run(Program("print(1)")).outputs == (b"1\n",)


@pytest.mark.skipif(not shutil.which("unshare"), reason="util-linux is not installed")
def test_namespaces_are_used_where_the_machine_allows_them():
    # unshare of util-linux is the judge of that.
    as_root = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    mounts = ["sh", "-c", "mount -t tmpfs none /tmp && mount --bind /usr/lib /mnt"]
    allowed = subprocess.run(["unshare", *as_root, "--mount", "--pid", "--net", "--ipc", "--fork", *mounts],
                             stderr=subprocess.DEVNULL)
    assert describe_isolation().namespaces == (allowed.returncode == 0)


@pytest.mark.parametrize("num_left", [0, 1, 2])
def test_a_run_that_gets_no_descriptor_says_so_and_keeps_none(monkeypatch, num_left):
    create, left = os.memfd_create, iter(range(num_left))

    def create_while_some_are_left(name):
        if next(left, None) is None:
            raise OSError(errno.EMFILE, "Too many open files")
        return create(name)

    monkeypatch.setattr(os, "memfd_create", create_while_some_are_left)
    before = os.listdir("/proc/self/fd")
    outcome = Sandbox(isolation=Isolation(), allow_unsafe=True).run(Program("print(1)"))
    assert outcome.reason == "sandbox_error" and "Too many open files" in outcome.complaint
    assert os.listdir("/proc/self/fd") == before


def test_a_run_that_gets_no_folder_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    outcome = Sandbox(isolation=Isolation(), allow_unsafe=True).run(Program("print(1)"))
    assert outcome.reason == "sandbox_error" and "No such file or directory" in outcome.complaint


def test_isolation_says_what_it_is_made_of():
    assert str(Isolation(namespaces=True, user_namespace=True)) == "namespaces: user, mount, pid, net, ipc; rlimits"
    assert str(Isolation(landlock=6, uid=True)) == "landlock: files, TCP, signals; uid; rlimits; NOT isolated: UDP"
    assert str(Isolation(landlock=1)) == "landlock: files; rlimits; NOT isolated: processes, network"


ORDINARY_USERS = """
import os, socket, subprocess
from mindpangu.rewards.code import CodeVerifier
from mindpangu.rewards.sandbox import Program, Sandbox, try_isolations
from mindpangu.rewards.sandbox_child import landlock_version
attacks = '''
import ctypes, os, signal, socket
def attempt(name, action):
    try: action()
    except OSError: return
    print(name)
attempt("read", lambda: open("/etc/passwd").read())
attempt("read environment", lambda: open("/proc/%d/environ").read())
attempt("write", lambda: open("/dev/shm/x", "w"))
attempt("write to the root", lambda: os.mkdir("/new"))
if ctypes.CDLL(None).mount(b"none", os.environ["HOME"].encode(), b"tmpfs", 0, None) == 0: print("mount")
attempt("kill", lambda: os.kill(%d, signal.SIGKILL))
attempt("connect", lambda: socket.create_connection(("127.0.0.1", int(input()))))
if os.fork() == 0:
    os.setsid()
    while True: signal.pause()
''' % (os.getpid(), os.getpid())
server = socket.create_server(("127.0.0.1", 0))
for isolation in try_isolations():
    if isolation.missing: continue
    outcome = Sandbox(isolation=isolation).run(Program(attacks, str(server.getsockname()[1]).encode()))
    assert outcome == ("ended", (0,), (b"",), ""), outcome
    score = CodeVerifier(isolation=isolation).run_tests("def f(x): return [x]", ("assert f(1) == [1]",))
    assert score.reason == "correct", score
    print("safe:", isolation)
print("landlock:", landlock_version())
left = subprocess.run(["ps", "-u", str(os.getuid()), "-o", "pid="], capture_output=True, text=True).stdout.split()
print("left:", len(set(map(int, left)) - {os.getpid()}) - 1)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="the other tests are an ordinary user's already")
def test_an_ordinary_user_is_as_safe(tmp_path):
    python = next((path for path in ("/usr/bin/python3.11", "/usr/bin/python3.10") if os.path.exists(path)), None)
    if python is None or not shutil.which("ps"):
        pytest.skip("there is no Python 3.10 or 3.11 that other users can run")
    user = 61_000 + os.getpid() % 1000  # that nobody has
    done = subprocess.run([python, "-c", ORDINARY_USERS], cwd="/", user=user, group=user, extra_groups=[],
                          env={"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "PATH": "/usr/bin:/bin"},
                          capture_output=True, text=True)
    if "Permission denied" in done.stderr and str(ROOT) in done.stderr:
        pytest.skip("other users cannot read the project")
    assert done.returncode == 0, done.stderr
    assert "left: 0" in done.stdout and "safe: " in done.stdout
    # What the kernel has is in use: version 6 came with Linux 6.12 and the rules for signals.
    version = int(done.stdout.split("landlock: ")[-1].split()[0])
    assert ("safe: landlock: files, TCP, signals" in done.stdout) == (version >= 6)
