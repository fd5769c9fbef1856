"""The sandbox's launcher: a process of its own that isolates programs, runs them and reports. Standard library only.

sandbox.py starts it (by execution, never by a bare fork: a trainer has threads) once for each run:

    launcher        leaves the machine's files, network and shared memory behind; supervises; runs nothing untrusted
      program 0     first process of a process namespace of its own, so that all its descendants die with it
      program 1     the same, if there is one; joined to program 0 by pipes, and else out of its sight

Without namespaces the programs are plain children under Landlock's rules, and the launcher, to which orphans fall,
kills what descends from it.

Programs are forks of the launcher: an interpreter starts once in a run. What they may not read must therefore never
come into the launcher's memory; it passes program texts and inputs on as files that it does not open.
"""
import ctypes
import fcntl
import marshal
import os
import resource
import select
import sys
import time

WORK_FOLDER = "/tmp"  # of programs that have files of their own: in memory, gone with the run
LINK_IN, LINK_OUT = 3, 4  # a program's ends of the pipes that join it to the other
MAX_FILES = 32  # open ones
MAX_FILE_MIB = 4
MAX_WORK_MIB = 16
# A program that is no longer needed may end by itself, so that its exit status is its own.
FAREWELL_S = 0.5

# linux/sched.h, linux/mount.h, linux/prctl.h, linux/landlock.h
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38
SYS_CLONE3, SYS_LANDLOCK_CREATE, SYS_LANDLOCK_ADD, SYS_LANDLOCK_RESTRICT = 435, 444, 445, 446
LANDLOCK_READ = 1 << 2 | 1 << 3  # files, folders
LANDLOCK_WRITE_FILE = 1 << 1
LANDLOCK_VERSION = 1
SIGKILL, SIGSTOP, SIGCHLD = 9, 19, 17  # importing signal costs milliseconds

# The GIL stays held in calls: clone3's child must find it so.
_libc = ctypes.PyDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def main(request):
    """request: see sandbox.Sandbox. Writes what became of the run to standard output, or fails with a message."""
    isolation = request["isolation"]
    _prctl(PR_SET_PDEATHSIG, SIGKILL)
    if os.getppid() != request["parent"]:
        sys.exit("the process that asked is gone")
    # Where memory runs out in spite of the limits, the kernel takes these processes before any other.
    _write("/proc/self/oom_score_adj", "1000")
    if not isolation["uid"]:
        # The limit counts whatever else the user runs: in a user namespace, from Linux 5.14 on, this process alone.
        alone = isolation["user_namespace"] and _kernel() >= (5, 14)
        request["max_processes"] += 1 if alone else _count_tasks_of_user()
    if isolation["namespaces"]:
        _leave_the_machine(isolation["user_namespace"])
    else:
        _prctl(PR_SET_CHILD_SUBREAPER, 1)
    _prctl(PR_SET_DUMPABLE, 0)

    programs = request["programs"]
    links = [None]
    if len(programs) == 2:
        (in_0, out_1), (in_1, out_0) = os.pipe(), os.pipe()
        links = [(in_0, out_0), (in_1, out_1)]
    failure_in, failure_out = os.pipe()
    outputs, pids = [], []
    for program, link in zip(programs, links, strict=True):
        output_in, output_out = os.pipe()
        pid = _fork(isolation["namespaces"])
        if pid == 0:
            text = _become_program(request, program, link, output_out, failure_out)
            exec(compile(text, "<program>", "exec"), {"__name__": "__main__"})
            return
        pids.append(pid)
        outputs.append(output_in)
        os.close(output_out)
    for descriptor in (failure_out, *(end for link in links if link for end in link)):
        os.close(descriptor)
    with open(failure_in, "rb") as file:  # ends when every program's process is set up
        failure = file.read().decode()
    if failure:
        _end(pids, isolation["namespaces"])
        sys.exit(failure)
    outcome = _supervise(pids, outputs, [program["max_output_kib"] << 10 for program in programs],
                         request["timeout_s"], isolation["namespaces"])
    with open(1, "wb") as file:
        marshal.dump(outcome, file)
    os._exit(0)  # at once: the interpreter's own end takes milliseconds


def _supervise(pids, outputs, max_outputs, timeout_s, namespaces):
    """Wait until the first program ends, time is up or one has written too much; then nothing of them is left.

    Returns (reason, exit code of each or None where it was ended here, the start of each one's output).
    """
    texts = [bytearray() for _ in pids]
    poller = select.poll()
    writers, running = {}, {}
    for index, (pid, output) in enumerate(zip(pids, outputs, strict=True)):
        os.set_blocking(output, False)
        writers[output] = index
        running[os.pidfd_open(pid)] = index
    for descriptor in (*writers, *running):
        poller.register(descriptor, select.POLLIN)

    def read(output):
        """Take what is there to read. False once there is too much."""
        index = writers[output]
        while len(texts[index]) <= max_outputs[index]:
            try:
                piece = os.read(output, 1 << 16)
            except BlockingIOError:
                return True
            if not piece:
                poller.unregister(output)  # it would be ready for ever
                del writers[output]
                return True
            texts[index] += piece
        return False

    def wait(deadline, index):
        """Until the program has ended ("ended"), the deadline ("timeout"), or too much output ("output_limit")."""
        while index in running.values():
            left_ms = (deadline - time.monotonic()) * 1000
            if left_ms <= 0:
                return "timeout"
            for descriptor, _ in poller.poll(left_ms):
                if descriptor in running:
                    poller.unregister(descriptor)
                    del running[descriptor]
                elif not read(descriptor):
                    return "output_limit"
        return "ended"

    deadline = time.monotonic() + timeout_s
    reason = wait(deadline, 0)
    for index in range(1, len(pids)):
        if reason == "ended":
            wait(min(deadline, time.monotonic() + FAREWELL_S), index)
    codes = _end(pids, namespaces)
    # Nobody is left who could write more.
    if reason == "ended" and not all([read(output) for output in list(writers)]):
        reason = "output_limit"
    return reason, codes, [bytes(text[:most]) for text, most in zip(texts, max_outputs, strict=True)]


def _end(pids, namespaces):
    """Kill and reap the programs and all that they started. Returns exit codes, None for those still running."""
    codes = []
    for pid in pids:
        done, status = os.waitpid(pid, os.WNOHANG)
        codes.append(os.waitstatus_to_exitcode(status) if done else None)
    if not namespaces:
        _end_descendants()
        return codes
    for pid, code in zip(pids, codes, strict=True):
        if code is None:
            os.kill(pid, SIGKILL)
            os.waitpid(pid, 0)  # the first process of a namespace ends after all others in it
    return codes


def _end_descendants():
    """Without a namespace: what descends from this process cannot leave it, as it adopts orphans.

    All are stopped before any is killed: stopped ones start no others, so a fork bomb runs into its own limit.
    """
    stopped = set()
    while found := _descendants() - stopped:
        for pid in found:
            _send(pid, SIGSTOP)
        stopped |= found
    while True:
        for pid in _descendants():
            _send(pid, SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _send(pid, number):
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def _descendants():
    children = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()  # the name before it may hold anything
            except (FileNotFoundError, ProcessLookupError):
                continue
            if fields[0] != b"Z":
                children.setdefault(int(fields[1]), []).append(int(name))
    found, waiting = set(), [os.getpid()]
    while waiting:
        for pid in children.get(waiting.pop(), ()):
            found.add(pid)
            waiting.append(pid)
    return found


def _count_tasks_of_user():
    total = 0
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                if os.stat(f"/proc/{name}").st_uid == os.getuid():
                    total += len(os.listdir(f"/proc/{name}/task"))
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                pass
    return total


def _kernel():
    return tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])


def _installation():
    """Folders, then files, that Python needs to import its standard library. No symbolic links."""
    places = [f"{sys.base_prefix}/lib", f"{sys.base_prefix}/lib64", "/usr/lib", "/usr/lib64", "/lib", "/lib64"]
    folders = [place for place in dict.fromkeys(places) if os.path.isdir(place) and not os.path.islink(place)]
    return folders, ["/etc/ld.so.cache", "/dev/null"]


def _leave_the_machine(user_namespace):
    """Enter own namespaces: no network, no shared memory, and no files but Python's, read-only, and an empty folder."""
    uid, gid = os.geteuid(), os.getegid()
    flags = CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    _call("unshare", flags | (CLONE_NEWUSER if user_namespace else 0))
    if user_namespace:
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
            _write(f"/proc/self/{name}", text)
    # No System V memory: it outlives the process that fills it, and counts in no limit of it.
    for name, text in (("shmall", "0"), ("msgmni", "0"), ("sem", "0 0 0 0")):
        _write(f"/proc/sys/kernel/{name}", text)
    _mount("none", "/", None, MS_REC | MS_PRIVATE)
    folders, files = _installation()
    # Opened before the new root may hide one of them, but after unshare: the kernel binds only what belongs to this
    # namespace.
    sources = {place: os.open(place, os.O_PATH) for place in (*folders, *files) if os.path.exists(place)}
    _mount("root", WORK_FOLDER, "tmpfs", MS_NOSUID | MS_NODEV, "size=64k,mode=755")
    root = f"{WORK_FOLDER}/root"
    os.makedirs(root + WORK_FOLDER)
    _mount("work", root + WORK_FOLDER, "tmpfs", MS_NOSUID | MS_NODEV,
           f"size={MAX_WORK_MIB}m,nr_inodes=1000,mode=1777")
    for place, source in sources.items():
        target = root + place
        if place in folders:
            os.makedirs(target, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.close(os.open(target, os.O_CREAT))
        _mount(f"/proc/self/fd/{source}", target, None, MS_BIND | MS_REC)
        # What the source's mount forbids cannot be allowed again; /dev/null is a device.
        kept = os.statvfs(target).f_flag & (MS_NOEXEC | MS_NODEV)
        _mount("none", target, None,
               MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | kept | (0 if place == "/dev/null" else MS_NODEV))
        os.close(source)
    for place in ("/lib", "/lib64"):
        if os.path.islink(place):
            os.symlink(os.readlink(place), root + place)
    # Nobody may add to the root: a program could put a module where the other one looks for it.
    _mount("none", WORK_FOLDER, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)
    os.chdir(WORK_FOLDER)
    _call("pivot_root", b".", b".")
    _call("umount2", b".", MNT_DETACH)
    # Inside a change of root the kernel makes no user namespaces, in which a program could mount memory without limit.
    os.chroot("root")
    os.chdir("/")


def _write(path, text):
    with open(path, "w") as file:
        file.write(text)


def _mount(source, target, kind, flags, options=None):
    arguments = (source, target, kind, flags, options)
    _call("mount", *(value.encode() if isinstance(value, str) else value for value in arguments))


def _fork(namespaces):
    """os.fork; with namespaces the child is the first process of a namespace."""
    if not namespaces:
        return os.fork()
    # unshare would serve only one child. This child misses what os.fork does for other threads; there are none.
    arguments = (ctypes.c_uint64 * 8)(CLONE_NEWPID, 0, 0, 0, SIGCHLD, 0, 0, 0)
    return _call("syscall", SYS_CLONE3, arguments, ctypes.sizeof(arguments))


def _become_program(request, program, link, output, failure):
    """In the child: give up every right and descriptor that a program must not have. Returns the program's text."""
    try:
        isolation = request["isolation"]
        os.setsid()
        with open(program["text"], "rb") as file:
            text = file.read()
        kept = [program["input"], output, output, *(link or ()), failure]
        # First out of the way of all targets, so that none is overwritten before it is copied.
        for target, copy in enumerate([fcntl.fcntl(descriptor, fcntl.F_DUPFD, len(kept)) for descriptor in kept]):
            os.dup2(copy, target)
        failure = len(kept) - 1
        os.closerange(len(kept), 1 << 16)
        _prctl(PR_SET_NO_NEW_PRIVS, 1)
        if isolation["landlock"]:
            _restrict_with_landlock(isolation["landlock"])
        _set_limits(request)
        if isolation["uid"]:
            os.setgroups([])
            os.setresgid(*[request["uid"]] * 3)
            os.setresuid(*[request["uid"]] * 3)
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
        _call("capset", header, (ctypes.c_uint32 * 6)())
        # After the change of user, which resets both. Not dumpable: no process of the same user may trace this one.
        _prctl(PR_SET_PDEATHSIG, SIGKILL)
        _prctl(PR_SET_DUMPABLE, 0)
        folder = WORK_FOLDER if isolation["namespaces"] else request["folder"]
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(HOME=folder, TMPDIR=folder, LANG="C.UTF-8")
        sys.argv[:] = ["program"]
        os.close(failure)
        return text
    except BaseException as error:  # nothing may go on from here with the launcher's rights
        os.write(failure, f"{type(error).__name__}: {error}".encode())
        os._exit(1)


def _set_limits(request):
    cpu_s = int(request["timeout_s"]) + 2  # the launcher's clock comes first, unless the launcher was killed
    for kind, value in ((resource.RLIMIT_CPU, cpu_s), (resource.RLIMIT_AS, request["memory_mib"] << 20),
                        (resource.RLIMIT_FSIZE, MAX_FILE_MIB << 20), (resource.RLIMIT_NOFILE, MAX_FILES),
                        (resource.RLIMIT_NPROC, request["max_processes"]), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def landlock_version():
    """Of the kernel's Landlock, 0 where it has none."""
    return max(0, _libc.syscall(SYS_LANDLOCK_CREATE, None, ctypes.c_size_t(0), LANDLOCK_VERSION))


def _restrict_with_landlock(version):
    """Allow reading the installation; no other file, no TCP (from version 4 on), no signal to outside (from 6 on)."""
    num_rights = {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)
    handled = (ctypes.c_uint64 * 3)((1 << num_rights) - 1, 0b11 if version >= 4 else 0, 0b11 if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = _call("syscall", SYS_LANDLOCK_CREATE, handled, ctypes.c_size_t(size), 0)
    folders, files = _installation()
    for place in (*folders, *files):
        if os.path.exists(place):
            rights = LANDLOCK_READ if place in folders else LANDLOCK_READ & 1 << 2
            if place == "/dev/null":
                rights |= LANDLOCK_WRITE_FILE
            descriptor = os.open(place, os.O_PATH)
            rule = rights.to_bytes(8, sys.byteorder) + descriptor.to_bytes(4, sys.byteorder)  # a packed structure
            _call("syscall", SYS_LANDLOCK_ADD, ruleset, 1, rule, 0)
            os.close(descriptor)
    _call("syscall", SYS_LANDLOCK_RESTRICT, ruleset, 0)
    os.close(ruleset)


def _prctl(option, value):
    _call("prctl", option, value, 0, 0, 0)  # the kernel refuses some options unless the rest is zero


def _call(name, *arguments):
    """A function of the C library that reports failure as -1; raises OSError."""
    # As longs: syscall is variadic, and the upper half of an int's register would be anything.
    passed = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    result = getattr(_libc, name)(*passed)
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{os.strerror(code)} in {name}{arguments}")
    return result
