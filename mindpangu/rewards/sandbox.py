"""Run untrusted Python programs: away from the files, processes and network of this machine, within limits, to the end.

    outcome = Sandbox(timeout_s=10).run(Program("print(6 * 7)"))        # outcome.outputs == (b"42\\n",)

What isolates depends on the machine (describe_isolation); where files or processes cannot be isolated Sandbox refuses.
Linux 5.3 or newer. What a program can read: Python's installation and the system's libraries. In namespaces it has an
empty folder in memory to write to, under Landlock none. Limits hold for each process: a program that starts others may
take max_processes * memory_mib.

Landlock alone (an ordinary user where user namespaces are forbidden) covers the contents of files, not their modes,
owners and times, and of the network TCP, from Linux 6.7 on; UDP and named sockets of other programs stay reachable.
"""

import contextlib
import functools
import itertools
import marshal
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from mindpangu.rewards import sandbox_child

# All modules come compiled: where no bytecode is cached, compiling would take longer than everything else. In place of
# -I, which would ignore PYTHONHASHSEED, the environment is empty and the current folder is no place to find modules.
_OPTIONS = ("-s", "-S", "-B", "-X", "utf8", "-c")
_START = """\
import marshal, sys
from types import ModuleType
del sys.path[0]
with open(0, "rb", closefd=False) as file:
    request, modules = marshal.load(file)
for name, code in modules.items():
    sys.modules[name] = ModuleType(name)
    exec(code, vars(sys.modules[name]))
sys.modules["sandbox_child"].main(request)
"""
# For the launcher to start and to clean up, beyond the program's own time.
_GRACE_S = 30
_NUM_UIDS = 1000
# From anywhere on: two trainers that both began at 0 would share users, whose limit of processes is one for both.
_run_numbers = itertools.count(int.from_bytes(os.urandom(2), "big"))


class Program(NamedTuple):
    """source: Python, run as __main__; input: what it reads from standard input.

    max_output_kib: of standard output and error together; None: the sandbox's.
    """

    source: str
    input: bytes = b""
    max_output_kib: int | None = None


class Outcome(NamedTuple):
    """What became of a run.

    reason: "ended", "timeout", "output_limit", or "sandbox_error" where the sandbox itself failed (details: complaint).
    exit_codes: of each program, negative for a signal, None if it was still running and was killed.
    outputs: of each program, standard output and error together, up to the limit.
    """

    reason: str
    exit_codes: tuple[int | None, ...] = ()
    outputs: tuple[bytes, ...] = ()
    complaint: str = ""


class Isolation(NamedTuple):
    """What keeps a program apart from this machine."""

    namespaces: bool = False  # of mounts, processes, network and shared memory
    user_namespace: bool = False  # the one that lets an ordinary user have the others
    landlock: int = 0  # the version of its rules in use, 0: none
    uid: bool = False  # a user of its own

    @property
    def missing(self):
        """What is not isolated of "files" and "processes": without these two no untrusted program should run."""
        files = self.namespaces or self.landlock
        processes = self.namespaces or self.uid or self.landlock >= 6
        return [name for name, isolated in (("files", files), ("processes", processes)) if not isolated]

    def __str__(self):
        parts = []
        if self.namespaces:
            parts.append(f"namespaces: {'user, ' if self.user_namespace else ''}mount, pid, net, ipc")
        if self.landlock:
            covered = ["files", *(["TCP"] if self.landlock >= 4 else []), *(["signals"] if self.landlock >= 6 else [])]
            parts.append(f"landlock: {', '.join(covered)}")
        if self.uid:
            parts.append("uid")
        parts.append("rlimits")
        network = [] if self.namespaces else ["UDP"] if self.landlock >= 4 else ["network"]
        if self.missing or network:
            parts.append(f"NOT isolated: {', '.join([*self.missing, *network])}")
        return "; ".join(parts)


class Sandbox:
    """Limits and a way of isolation; runs may overlap, from any thread.

    timeout_s: wall clock of a run, all programs together. memory_mib: address space of each process.
    max_processes: processes and threads, of a pair of programs together. max_output_kib: see Program.
    preload: modules of this package that programs may import, by their last names.
    isolation: one of try_isolations(), for tests; the best by default.
    Raises ValueError if files or processes cannot be isolated and allow_unsafe is not set.
    """

    def __init__(self, timeout_s=10.0, memory_mib=512, max_output_kib=256, max_processes=8, allow_unsafe=False,
                 preload=(), isolation=None):
        self.isolation = describe_isolation() if isolation is None else isolation
        if self.isolation.missing and not allow_unsafe:
            raise ValueError(
                f"this machine cannot isolate the {' and '.join(self.isolation.missing)} of programs that a model "
                f"writes (it has {self.isolation}): allow namespaces (as an ordinary user "
                "kernel.unprivileged_userns_clone or user.max_user_namespaces; in a container CAP_SYS_ADMIN), or use "
                "Linux 6.12 or newer with Landlock, with a Python that other users can read; or accept that such "
                "programs run with your rights: rewards.code.allow_unsafe=true.")
        self.timeout_s, self.memory_mib = timeout_s, memory_mib
        self.max_output_kib, self.max_processes = max_output_kib, max_processes
        self._modules = {module.__name__.rpartition(".")[2]: _code_of(module) for module in (sandbox_child, *preload)}

    def run(self, *programs):
        """Run one or two Programs to the end of the first, and end all that they started. Returns an Outcome.

        Two are isolated from each other, too, joined only by pipes: sandbox_child.LINK_IN and LINK_OUT.
        """
        files = []
        own_folder = not self.isolation.namespaces and not self.isolation.landlock
        try:
            with tempfile.TemporaryDirectory() if own_folder else contextlib.nullcontext("/") as folder:
                if own_folder:
                    os.chmod(folder, 0o777)
                for program in programs:
                    for content in (program.source.encode(), program.input):
                        files.append(_as_file(content))
                return self._launch(programs, files, folder)
        except OSError as error:  # no process, descriptor or disk space left, for example
            return Outcome("sandbox_error", complaint=str(error))
        finally:
            for descriptor in files:
                os.close(descriptor)

    def _launch(self, programs, files, folder):
        request = {
            "isolation": self.isolation._asdict(), "folder": folder, "parent": os.getpid(),
            "uid": _first_uid() + next(_run_numbers) % _NUM_UIDS,
            "timeout_s": self.timeout_s, "memory_mib": self.memory_mib,
            "max_processes": self.max_processes + len(programs) - 1,  # the other program's own
            "programs": [{"text": text, "input": given, "max_output_kib": program.max_output_kib or self.max_output_kib}
                         for program, text, given in zip(programs, files[::2], files[1::2], strict=True)]}
        orders = _as_file(marshal.dumps((request, self._modules)))
        try:
            launcher = subprocess.Popen([os.path.realpath(sys.executable), *_OPTIONS, _START], stdin=orders,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/",
                                        env={"PYTHONHASHSEED": "0"}, start_new_session=True, pass_fds=files)
        finally:
            os.close(orders)
        try:
            report, complaint = launcher.communicate(timeout=self.timeout_s + _GRACE_S)
        except subprocess.TimeoutExpired:
            return Outcome("sandbox_error", complaint=f"the launcher did not end within {_GRACE_S} s of the limit")
        finally:
            if launcher.poll() is None:
                launcher.kill()  # and with it the programs: the kernel kills them at their parent's death
                launcher.communicate()
        if launcher.returncode != 0:
            return Outcome("sandbox_error", complaint=complaint.decode(errors="replace").strip()
                           or f"the launcher ended with {launcher.returncode}")
        reason, exit_codes, outputs = marshal.loads(report)
        return Outcome(reason, tuple(exit_codes), tuple(outputs))


def describe_isolation():
    """The best Isolation that works here."""
    return min(try_isolations(), key=lambda isolation: len(isolation.missing))


@functools.lru_cache
def try_isolations():
    """Every Isolation that works here, best first; the last is none at all."""
    landlock = sandbox_child.landlock_version()
    if os.geteuid() == 0:
        wanted = [Isolation(namespaces=True, uid=True), Isolation(landlock=landlock, uid=True), Isolation(uid=True)]
    else:
        wanted = [Isolation(namespaces=True, user_namespace=True), Isolation(landlock=landlock)]
    probe = Program("import json, random, zlib; open('/dev/null', 'w').close(); print('works')")
    return [isolation for isolation in dict.fromkeys(wanted)
            if Sandbox(allow_unsafe=True, isolation=isolation).run(probe).outputs == (b"works\n",)] + [Isolation()]


@functools.lru_cache
def _first_uid():
    """The first of _NUM_UIDS users that nobody has: the highest ones that this machine's numbering allows."""
    inside, _, count = Path("/proc/self/uid_map").read_text().split()[-3:]
    return int(inside) + int(count) - _NUM_UIDS


@functools.lru_cache
def _code_of(module):
    return module.__spec__.loader.get_code(module.__name__)


def _as_file(content):
    """A descriptor of a file in memory, to be read from its start."""
    descriptor = os.memfd_create("program")
    with open(descriptor, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor
