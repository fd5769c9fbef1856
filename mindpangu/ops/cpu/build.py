"""The CPU library: built with g++ against the installed MindSpore on first use, cached, chosen by the machine's CPU.

    python -m mindpangu.ops.cpu.build [LEVEL]     builds it and prints its path
"""

import ctypes
import fcntl
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

_SOURCES = Path(__file__).resolve().parent
# Instruction sets, best first: flags of /proc/cpuinfo that they need, and g++'s options. "portable" runs anywhere.
_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx2", "fma")
LEVELS = {
    "amx": (("amx_bf16", "amx_tile", "avx512_bf16", *_AVX512), ("amx-tile", "amx-bf16", "avx512bf16", *_AVX512)),
    "avx512_bf16": (("avx512_bf16", *_AVX512), ("avx512bf16", *_AVX512)),
    "avx512": (_AVX512, _AVX512),
    "avx2": (("avx2", "fma", "f16c"), ("avx2", "fma", "f16c")),
    "portable": ((), ()),
}
_OPTIONS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-D_GLIBCXX_USE_CXX11_ABI=0", "-ffp-contract=fast",
            "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-Wno-maybe-uninitialized", "-Wno-psabi")
SANITIZE = ("-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g", "-O1")


def best_level():
    """The name in LEVELS that this machine's processor can run."""
    found = set()
    if platform.machine() == "x86_64":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("flags"):
                found = set(line.split(":", 1)[1].split())
                break
    return next(level for level, (needs, _) in LEVELS.items() if set(needs) <= found)


class Compilation(NamedTuple):
    """How the library for a level is built on this machine."""

    level: str
    compiler: str
    compiler_version: str
    options: list
    headers: Path
    library: Path  # there if it has been built


def plan(level=None, extra_options=()):
    """The Compilation of the library for a level, this machine's best by default; builds nothing.

    Raises ValueError that says what to install where g++ or MindSpore is missing.
    """
    level = level or best_level()
    if level not in LEVELS:
        raise ValueError(f"level {level!r}: expected one of {list(LEVELS)}.")
    compiler = shutil.which("g++")
    if compiler is None:
        raise ValueError("run.kernels=native needs a C++ compiler to build the CPU kernels, once: install g++ (Debian: "
                         "apt install g++), or use run.kernels=reference.")
    compiler_version = subprocess.run([compiler, "-dumpfullversion"], capture_output=True, text=True, check=True).stdout
    spec = importlib.util.find_spec("mindspore")
    if spec is None:
        raise ValueError("run.kernels=native builds the CPU kernels against MindSpore, which is not installed: "
                         "pip install mindspore==2.9.0.")
    headers = Path(spec.origin).parent / "include/mindspore/ops/kernel/cpu/op_plugin"
    options = [*_OPTIONS, *(f"-m{flag}" for flag in LEVELS[level][1]), *extra_options]
    digest = hashlib.sha256("\0".join([compiler_version, version("mindspore"), *options]).encode())
    for path in sorted([*_SOURCES.glob("*.cc"), *_SOURCES.glob("*.h")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mindpangu"
    library = cache / f"cpu-{level}-{digest.hexdigest()[:16]}" / "libmindpangu_cpu.so"
    return Compilation(level, compiler, compiler_version.strip(), options, headers, library)


def build(level=None, extra_options=(), say=print):
    """Path of the library for a level (this machine's best by default), built if it is not in the cache.

    Raises ValueError that says what to install where g++ or MindSpore is missing, or with the compiler's message.
    """
    compilation = plan(level, extra_options)
    library, folder = compilation.library, compilation.library.parent
    if library.exists():
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot write the CPU kernels to {folder} ({error.strerror}): make it writable or set "
                         "XDG_CACHE_HOME to a folder that is.") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            say(f"building the CPU kernels ({compilation.level}) with g++ {compilation.compiler_version}, once: "
                f"{library}")
            started = time.monotonic()
            _compile(compilation.compiler, compilation.options, compilation.headers, folder, library)
            say(f"built in {time.monotonic() - started:.0f} s")
    return library


def _compile(compiler, options, headers, folder, library):
    """One compiler per source and core at a time, then the linker; renamed when whole."""
    waiting = sorted(_SOURCES.glob("*.cc"))
    objects = [folder / f"{source.stem}.o" for source in waiting]
    running = []
    limit = len(os.sched_getaffinity(0))
    while waiting or running:
        while waiting and len(running) < limit:
            source = waiting.pop(0)
            command = [compiler, *options, f"-I{headers}", "-c", source, "-o", folder / f"{source.stem}.o"]
            running.append((source, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                                     text=True)))
        source, process = running.pop(0)
        output = process.communicate()[0]
        if process.returncode:
            for _, other in running:
                other.kill()
            raise ValueError(f"g++ failed on {source}:\n{output[-3000:]}")
    aside = folder / ".library.writing"
    link = subprocess.run([compiler, *options, "-shared", *objects, "-o", aside, "-lpthread"], capture_output=True,
                          text=True)
    if link.returncode:
        raise ValueError(f"g++ failed to link {library}:\n{link.stderr[-3000:]}")
    for path in objects:
        path.unlink()
    os.replace(aside, library)


def load(library, num_threads):
    """Make MindSpore take its CPU kernels from the library; before its first op. Returns the ctypes DLL.

    Raises ValueError where MindSpore ran ops already, or is not the version whose inner order of things this knows.
    """
    import mindspore
    import numpy as np
    from mindspore import Tensor, ops

    def square(x):
        return ops.MatMul()(x.T + 1, x)

    dll = ctypes.CDLL(str(library))
    dll.pangu_set_num_threads(num_threads)
    dll.pangu_num_calls.restype = ctypes.c_int64
    dll.level = Path(library).parent.name.split("-")[1]
    os.environ["MS_OP_PLUGIN_PATH"] = str(library)
    mindspore.set_device("CPU")
    numbers = np.arange(6, dtype=np.float32).reshape(2, 3)
    before = dll.pangu_num_calls()
    views = dll.pangu_keep_views_contiguous()
    eager, graph = square(Tensor(numbers)).asnumpy(), mindspore.jit(square)(Tensor(numbers)).asnumpy()
    expected = (numbers.T + 1) @ numbers
    if not (views and dll.pangu_num_calls() >= before + 2 and (eager == expected).all() and (graph == expected).all()):
        raise ValueError("run.kernels=native could not be set up: it has to come before MindSpore's first op, and "
                         f"needs MindSpore 2.9.0 (this is {mindspore.__version__}); use run.kernels=reference.")
    return dll


if __name__ == "__main__":
    print(build(*sys.argv[1:2], say=lambda text: print(text, file=sys.stderr)))
